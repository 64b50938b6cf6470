from typing import Any

import pytest
import torch

from allmlp.checkpoints.layout import Layout
from allmlp.checkpoints.unwrapping import Unwrapped, check_weights
from allmlp.checkpoints.unwrapping import unwrap as unwrap_known
from allmlp.errors import UserError

WEIGHTS = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}
AVERAGE = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
KNOWN = Layout(
    source="known",
    family="",
    recognises=lambda tensors: "a.weight" in tensors,
    convert=lambda tensors, facts: pytest.fail("nothing is to be converted"),
    inferred="",
)


def unwrap(contents: dict[str, Any]) -> Unwrapped:
    return unwrap_known(contents, (KNOWN,))


def prefixed(prefix: str, weights: dict[str, torch.Tensor] = WEIGHTS) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("holder", ["state_dict", "model", "net", "model_state_dict", "params", "weights", "anything"])
def test_weights_are_found_wherever_trainers_put_them(holder: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    found = unwrap({holder: WEIGHTS, "optimizer": optimizer, "epoch": 3})
    assert found.layout is KNOWN
    assert found.tensors == WEIGHTS
    assert found.beside == {"optimizer": optimizer, "epoch": 3}
    assert found.notes == ("Left aside: 'optimizer', 'epoch'.",)


@pytest.mark.parametrize(
    ("average", "plain"),
    [
        ("state_dict_ema", "state_dict"),
        ("model_ema", "model"),
        ("ema", "module"),
        ("ema_state_dict", "model"),
        ("averaged_model", "net"),
        ("modelEMA", "student"),
    ],
)
def test_an_average_is_preferred_and_that_is_said(average: str, plain: str) -> None:
    found = unwrap({plain: WEIGHTS, average: AVERAGE})
    assert found.tensors == AVERAGE
    assert found.notes == (f"The averaged weights under '{average}' are taken, not '{plain}'.",)


def test_an_average_in_the_same_dictionary_is_preferred() -> None:
    counters = {"initted": torch.tensor(True), "step": torch.tensor(3)}
    found = unwrap({**prefixed("online_model."), **prefixed("ema_model.", AVERAGE), **counters})
    assert found.tensors == AVERAGE
    assert found.notes == (
        "The averaged weights under 'ema_model' are taken, not 'online_model'.",
        "Left aside: 'initted', 'step'.",
    )


def test_an_average_that_was_never_kept_is_passed_over() -> None:
    assert unwrap({"state_dict": WEIGHTS, "state_dict_ema": None}).tensors == WEIGHTS
    assert unwrap({"state_dict": WEIGHTS, "state_dict_ema": {}}).tensors == WEIGHTS


def test_a_schema_is_no_average() -> None:
    assert unwrap({"model": WEIGHTS, "schema": AVERAGE}).tensors == WEIGHTS


def test_of_several_the_usual_one_is_taken_and_the_others_are_said() -> None:
    found = unwrap({"student": dict(AVERAGE), "net": AVERAGE, "model": WEIGHTS})
    assert found.tensors == WEIGHTS
    assert found.notes == ("The weights under 'model' are taken, not 'net', 'student'.",)


def test_of_several_by_unusual_names_none_is_taken() -> None:
    with pytest.raises(UserError, match=r"several sets of weights: 'student', 'teacher'\. Save the one that you mean"):
        unwrap({"student": WEIGHTS, "teacher": AVERAGE})


def test_tensors_by_number_are_no_weights() -> None:
    found = unwrap({"model": {**WEIGHTS, 0: torch.ones(2)}})
    assert found.tensors == WEIGHTS
    assert found.notes == ("Left aside: 0.",)


def test_bare_weights_are_taken_as_they_are() -> None:
    found = unwrap(WEIGHTS)
    assert found.tensors == WEIGHTS
    assert not found.notes


def test_holders_may_lie_in_each_other_and_beside_loose_tensors() -> None:
    found = unwrap({"lr": torch.tensor(0.1), "model": {"step": 3, "state_dict": WEIGHTS}, "config": {"a": 1}})
    assert found.tensors == WEIGHTS
    assert found.beside.keys() == {"lr", "config", "step"}


@pytest.mark.parametrize(
    "prefix",
    ["module.", "net.", "_orig_mod.", "module._orig_mod.model.", "_forward_module.backbone.", "params/", "opt/target/"],
)
def test_any_prefix_comes_off(prefix: str) -> None:
    found = unwrap(prefixed(prefix))
    assert found.tensors == WEIGHTS
    assert not found.notes


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_wrapping_modules_may_be_anywhere(wrapper: str) -> None:
    assert unwrap({name.replace("a.", f"a.{wrapper}"): WEIGHTS[name] for name in WEIGHTS}).tensors == WEIGHTS
    with pytest.raises(UserError, match=r"'a\.bias' is there twice"):
        unwrap({**WEIGHTS, f"a.{wrapper}bias": torch.ones(2)})


def test_a_part_of_a_larger_model_is_taken_and_the_rest_is_said() -> None:
    others = {"criterion.weight": torch.ones(3), "acc.tp": torch.zeros(3, dtype=torch.long)}
    found = unwrap({"state_dict": {**prefixed("model."), **others}, "epoch": 3})
    assert found.tensors == WEIGHTS
    assert found.notes == (
        "The part 'state_dict.model' is taken, without 'criterion', 'acc'.",
        "Left aside: 'epoch'.",
    )
    found = unwrap({**prefixed("module.backbone."), "module.neck.conv.weight": torch.ones(3), "scale": torch.ones(1)})
    assert found.notes == ("The part 'module.backbone' is taken, without 'module.neck', 'scale'.",)


def test_the_counter_of_an_averaged_model_is_no_weight() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.ModuleDict({"a": torch.nn.Linear(3, 2)})).state_dict()
    found = unwrap(averaged)
    assert found.tensors.keys() == WEIGHTS.keys()
    assert found.notes == ("Left aside: 'n_averaged'.",)


def test_no_weights_are_an_error_that_says_what_there_is() -> None:
    with pytest.raises(UserError, match="no weights, only 'epoch', 'optimizer'"):
        unwrap({"epoch": 3, "optimizer": {"state": {}}})
    with pytest.raises(UserError, match="no weights, only nothing"):
        unwrap({})


def test_other_weights_are_named() -> None:
    with pytest.raises(UserError, match=r"weights of these names: 'conv1\.weight', 'conv1\.bias'\. Known are known\."):
        unwrap({"model": {"conv1.weight": torch.zeros(2, 2), "conv1.bias": torch.zeros(2)}, "lr": torch.zeros(1)})


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), "has torch.int64"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.zeros(2, 3, device="meta"), "has no data"),
        (torch.tensor(1.0), r"has shape \[\]"),
        (torch.zeros(0, 3), r"has shape \[0, 3\]"),
        (torch.zeros(1).expand(2**20, 2**20), r"claims shape \[1048576, 1048576\], the file holds less"),
    ],
    ids=["integers", "sparse", "meta", "scalar", "empty", "swelling"],
)
def test_what_is_no_plain_weight_is_refused(tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(UserError, match=rf"'a\.weight'.*{message}"):
        check_weights({**WEIGHTS, "a.weight": tensor})


def test_what_holds_itself_is_looked_at_once() -> None:
    contents: dict[str, Any] = {"model": WEIGHTS}
    contents["state_dict"] = contents
    assert unwrap(contents).tensors == WEIGHTS


def test_names_and_dictionaries_without_end_take_no_time() -> None:
    with pytest.raises(UserError, match="No known project"):
        unwrap({"a." * 10**5: torch.zeros(2)})
    nested: dict[str, Any] = {"a": {}}
    for _ in range(10**4):
        nested = {"a": nested}
    with pytest.raises(UserError, match="no weights"):
        unwrap(nested)
    # Taken apart level by level, since Python's own way recurses.
    while nested:
        nested = nested["a"]
