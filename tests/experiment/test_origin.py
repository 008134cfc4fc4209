"""What a run's results are made from, as the folders of former versions have it."""

import pytest

from corda_vlm.evaluation import load_suite
from corda_vlm.experiment.origin import task_digest


@pytest.mark.parametrize("name", ["template", "chat_template"])
def test_a_task_has_the_digest_that_folders_have_by_whichever_name_it_has_its_template(name):
    """The digests are those of the version in which the option was called `template`."""
    sums = {"name": "sums", "role": "gain", "kind": "qa", "limit": 5, "options": {name: "plain", "max_new_tokens": 2},
            "data": {"source": "jsonl:sums.jsonl", "format": "qa"}}  # fmt: skip
    (task,) = load_suite({"name": "s", "version": 1, "tasks": [sums]}).tasks
    assert task_digest(task) == "c640870d0f73a996"


def test_the_digests_of_what_ships_and_of_tasks_without_options_are_those_of_before():
    shipped = {task.name: task_digest(task) for task in load_suite("smollm2").tasks}
    assert shipped == {
        "gsm8k": "c16191d5abeda833", "nq-open": "83b91439a00c1cda", "triviaqa": "50590aa3b05a99f9",
    }  # fmt: skip
    plain = {"name": "plain", "role": "retention", "kind": "perplexity", "data": "jsonl:x.jsonl", "metrics": ["perplexity"]}  # fmt: skip
    digits = {"name": "digits", "role": "retention", "kind": "zero_shot", "data": "sklearn:digits", "classes": ["a", 1],
              "templates": ["a {}"]}  # fmt: skip
    tasks = load_suite({"name": "s", "version": 1, "tasks": [plain, digits]}).tasks
    assert [task_digest(task) for task in tasks] == ["2fe00b8dca612fee", "172eb461c8153daf"]
