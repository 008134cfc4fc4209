"""Records in files, as the tests of formats write them."""

from __future__ import annotations

import json


def write(path, records):
    """Write records as JSON or JSON lines; returns the source that names them."""
    text = json.dumps(records) if path.suffix == ".json" else "\n".join(map(json.dumps, records))
    path.write_text(text)
    return f"{path.suffix[1:]}:{path}"


def asks(index, text="<image>\nWhat is it?", answer="A digit.", **more):
    """A record of LLaVA's about the picture of this number."""
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"id": f"r{index}", "image": f"{index}.png", "conversations": turns, **more}
