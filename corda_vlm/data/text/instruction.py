"""Records for models that generate text: conversations with or without pictures, questions, documents."""

from __future__ import annotations

from typing import Any

from PIL import Image

from corda_vlm.data.records import Record, Records
from corda_vlm.data.sources.images import fetched, to_rgb
from corda_vlm.data.text.rows import MAY_CALL, Message

_KEEP_PIXELS = 64 << 20
"""Decoded pictures are kept as long as they have no more pixels than this, at three bytes each."""


class InstructionData(Records):
    """Conversations, questions or documents, in a fixed order.

    A record has `messages` (list of {"role", "content"}; None for documents), `images` (RGB PIL images in the order of
    their places in the messages), `image` (the first, or None), `text` (of a document), `question` and `answers` (the
    first is the one to learn) of questions, `choices` and `choice` of multiple choice, and `may_call` of conversations with tools: what
    describes these.

    Records of no use (a picture that does not decode, places for images that do not match, an empty answer) are skipped
    and counted in `bad`, up to the share that the spec allows.
    """

    conversational = True

    @property
    def has_images(self) -> bool:
        return self._table.pictures is not None

    def messages(self, index: int) -> list[Message] | None:
        """The conversation of record `index`; None for a document or a record of no use."""
        column = self._table.columns.get("messages") if self.texts is None else None
        return None if column is None else column[int(self._rows[index])]

    def picture_key(self, index: int) -> int:
        """Equal for records about the same pictures."""
        row = int(self._rows[index])
        return row if self._table.parents is None else self._table.parents[row]

    def images(self, index: int) -> list[Image.Image]:
        """The pictures of record `index` in RGB. Raises as `to_rgb` does.

        Many questions may be about one picture, so decoded ones are kept while they are few or small.
        """
        if not self.has_images:
            return []
        kept: dict[int, list[Image.Image]] = self.cache.setdefault("pictures", {})
        key = self.picture_key(index)
        if key not in kept:
            images = [to_rgb(stored, self._table.base) for stored in self._stored(index)]
            size = sum(image.width * image.height for image in images)
            if self.cache.get("pixels", 0) + size > _KEEP_PIXELS:
                return images
            self.cache["pixels"] = self.cache.get("pixels", 0) + size
            kept[key] = images
        return kept[key]

    def image(self, index: int) -> Image.Image | None:
        """The first picture of record `index`, None if it has none."""
        return next(iter(self.images(index)), None)

    def _decoded(self, index: int) -> Record:
        images = self.images(index)
        return {
            "images": images,
            "image": images[0] if images else None,
            "messages": self.messages(index),
        }

    def _said(self) -> list[Any]:
        columns = [
            self._table.columns.get(name)
            for name in ("messages", "answers", "choices", "choice", MAY_CALL)
        ]
        return [
            *super()._said(),
            [[column[int(row)] for row in self._rows] for column in columns if column is not None],
        ]

    def _stored(self, index: int) -> list[Any]:
        pictures = self._table.pictures
        return [] if pictures is None else fetched(pictures, int(self._rows[index]))
