"""Forward, objective and backward ask the device for nothing: no operation of ours has a result that the host needs.

Counted on the CPU by a dispatch mode, since the same operations run on every device.
"""

import traceback

import pytest
import torch

from rft_lightning.objectives import GRPOObjective
from rft_lightning.policy.loading import load_policy
from rft_lightning.policy.prompt_inputs import prepared
from rft_lightning.policy.shared_prefix import group_logprobs_and_entropies, group_row
from tests.test_ap_device import Counting
from tests.test_rollout import setting

SHARED = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision"]


class Places(Counting):
    """Where the waits come from: the innermost file outside of torch, "backward" for what autograd runs."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = sum(self.waits.values())
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if sum(self.waits.values()) > before:
            files = [frame.filename for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.places.append(files[-1])
        return result


@pytest.mark.parametrize("freeze", [[], ["vision_tower", "projector"]], ids=["full", "frozen tower"])
@pytest.mark.parametrize("family", SHARED)
def test_an_update_waits_for_no_device(family_folder, family, freeze):
    folder = family_folder(family)
    _, encoder, rows = setting(folder)
    model = load_policy(folder, freeze=freeze)
    prompts = prepared(model.eval(), encoder(rows))
    model.train()
    ids = torch.full((4, 3, 5), 30)
    mask_BGC = torch.arange(5) < torch.tensor([[5, 3, 1]] * 4)[..., None]
    mask = mask_BGC.flatten(0, 1)
    row = group_row(prompts, mask_BGC.sum(-1).tolist(), 5)
    with Places() as found:
        logp, entropy = group_logprobs_and_entropies(model, prompts, ids, mask_BGC, row=row)
        logp = logp.flatten(0, 1)
        loss, _ = GRPOObjective(beta=0.04)(
            logp, None, logp.detach(), torch.ones(12), mask, entropy=entropy.flatten(0, 1), normalizer=12.0
        )
        loss.backward()
    assert len(found.operations) > 20
    # What is left is the models' own: a count of image tokens, sizes of pictures in their towers, Qwen3-VL's deepstack.
    assert not [place for place in found.places if "rft_lightning/" in place]
    if freeze and family != "qwen3_vl":
        assert len(found.places) <= 2


def test_a_wait_would_be_seen(monkeypatch):
    with Places() as found:
        torch.ones(3)[torch.ones(3) > 0]
    assert len(found.places) == 1
