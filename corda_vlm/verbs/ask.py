"""The verb ask: what a model says of a picture, or to a question."""

from __future__ import annotations

from typing import Annotated

from corda_vlm.errors import CordaError
from corda_vlm.evaluation.options import AskOptions
from corda_vlm.experiment import checks
from corda_vlm.families.options import LoadOptions
from corda_vlm.options import BY_PLACE
from corda_vlm.verbs.shared import listed_or_file, load_source

_SHOWN = 5


def ask(
    model: str,
    question: Annotated[str | None, BY_PLACE] = None,
    image: str | None = None,
    classes: list[str] | None = None,
    templates: list[str] | None = None,
    adapter: str | None = None,
    *,
    options: AskOptions,
    load: LoadOptions,
) -> None:
    """Ask a model a question, about a picture or without one; or which of some classes it sees in a picture.

    Example:
        corda-vlm ask shapes-llava "Is there a red shape?" --image picture.png

    Args:
        model: A built-in name, a folder, or an id on a hub; with --adapter the model before training.
        question: For a model that generates text.
        image: A file with a picture.
        classes: For a model that compares images with texts: class names, e.g. --classes cat,dog, or one name alone: of a list in
            eval/class_names, or of such a file.
        templates: Prompts with {} for the class, or one name alone without it: of a list in eval/templates, or of such a file; the
            default is "a photo of a {}.".
        adapter: Folder of a training: an adapter, or a full fine-tune.
    """
    checks.check_source(model)
    if (question is None) == (classes is None):
        raise CordaError(
            'give either a question, e.g. corda-vlm ask MODEL "What is this?" --image x.png, or for a model that compares images '
            "with texts --classes cat,dog --image x.png"
        )
    if classes is not None and image is None:
        raise CordaError("--classes are of a picture; name it with --image")
    if image is not None:
        checks.check_file(image, "picture", "give the file of one")
    if adapter is not None:
        checks.check_folder(adapter, "training's", "make it by corda-vlm train")
    from corda_vlm.evaluation.answers import ask as answer
    from corda_vlm.evaluation.answers import classify
    from corda_vlm.evaluation.class_names import DEFAULT_TEMPLATES, load_class_names, load_templates
    from corda_vlm.train.trained import load_trained

    loaded = load_source(model, load)
    trained = loaded.model if adapter is None else load_trained(loaded.model, adapter).model
    if question is not None:
        print(
            answer(
                trained,
                question,
                image,
                processor=loaded.processor,
                chat_template=options.chat_template,
                max_new_tokens=options.max_new_tokens,
            )
        )
        return
    if classes is not None and len(classes) == 1 and "," in classes[0]:
        classes = [name.strip() for name in classes[0].split(",")]
    named = listed_or_file(classes)
    names = load_class_names(named) if isinstance(named, str) else named or ()
    names = list(names.values() if isinstance(names, dict) else names)
    prompts = load_templates(listed_or_file(templates) or DEFAULT_TEMPLATES)
    assert image is not None
    for name, chance in classify(trained, image, names, prompts, processor=loaded.processor)[
        :_SHOWN
    ]:
        print(f"{chance:6.1%}  {name}")
