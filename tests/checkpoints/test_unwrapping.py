from typing import Any

import pytest
import torch

from allmlp.checkpoints.unwrapping import check_weights, strip_prefix, unwrap
from allmlp.errors import UserError

WEIGHTS = {"a.weight": torch.zeros(2, 3), "a.bias": torch.zeros(2)}
AVERAGE = {name: tensor + 1 for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize("holder", ["state_dict", "model", "module", "net"])
def test_weights_are_found_where_trainers_put_them(holder: str) -> None:
    optimizer = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": []}
    found = unwrap({holder: WEIGHTS, "optimizer": optimizer, "epoch": 3})
    assert found.tensors == WEIGHTS
    assert found.beside == {"optimizer": optimizer, "epoch": 3}
    assert found.notes == ["Left aside, since it is no weights: 'optimizer', 'epoch'."]


@pytest.mark.parametrize("holder", ["state_dict_ema", "model_ema", "ema"])
def test_an_average_is_preferred_and_that_is_said(holder: str) -> None:
    found = unwrap({"model": WEIGHTS, holder: AVERAGE})
    assert found.tensors == AVERAGE
    assert found.notes == [f"The averaged weights ('{holder}') are taken, not 'model'."]


def test_an_average_that_was_never_kept_is_passed_over() -> None:
    assert unwrap({"state_dict": WEIGHTS, "state_dict_ema": None}).tensors == WEIGHTS
    assert unwrap({"state_dict": WEIGHTS, "state_dict_ema": {}}).tensors == WEIGHTS


def test_bare_weights_are_taken_as_they_are() -> None:
    found = unwrap(WEIGHTS)
    assert found.tensors == WEIGHTS
    assert not found.notes


def test_holders_may_lie_in_each_other_and_beside_loose_tensors() -> None:
    found = unwrap({"lr": torch.tensor(0.1), "model": {"step": 3, "state_dict": WEIGHTS}, "config": {"a": 1}})
    assert found.tensors == WEIGHTS
    assert found.beside.keys() == {"lr", "config", "step"}


def test_the_counter_of_an_averaged_model_is_no_weight() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(3, 2)).state_dict()
    found = unwrap(averaged)
    assert found.tensors.keys() == {"module.weight", "module.bias"}
    assert "n_averaged" in found.notes[0]


def test_no_weights_are_an_error_that_says_what_there_is() -> None:
    with pytest.raises(UserError, match="no weights, only 'epoch', 'optimizer'"):
        unwrap({"epoch": 3, "optimizer": {"state": {}}})
    with pytest.raises(UserError, match="no weights, only nothing"):
        unwrap({})


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


@pytest.mark.parametrize("prefix", ["module.", "net.", "_orig_mod.", "model."])
def test_a_prefix_that_all_share_comes_off(prefix: str) -> None:
    assert strip_prefix({f"{prefix}{name}": tensor for name, tensor in WEIGHTS.items()}) == WEIGHTS
    assert strip_prefix({**WEIGHTS, f"{prefix}a": WEIGHTS["a.bias"]}) is None
    assert strip_prefix({}) is None


def test_what_holds_itself_is_refused() -> None:
    contents: dict[str, Any] = {"weight": torch.ones(3)}
    contents["model"] = contents
    with pytest.raises(UserError, match="It holds itself under 'model'"):
        unwrap(contents)
