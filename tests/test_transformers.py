"""Against transformers itself, on checkpoints that this package writes.  Group `crosscheck`."""

import json
import warnings

import numpy as np
import pytest

import refimpl
from refimpl.checkpoint import VirtualWeights, write

pytestmark = pytest.mark.crosscheck
torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

# float32 code against float64: transformers computes its rotary tables in float32 as well.
TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=["tiny-v3", "tiny-v3-noq", "tiny-v2"])
def both(request, tmp_path_factory):
    """A preset's virtual weights as a folder; logits, loss and gradients by both."""
    from transformers import AutoModelForCausalLM

    config, folder = refimpl.preset(request.param), tmp_path_factory.mktemp(request.param)
    weights = VirtualWeights(config)
    write(folder / "model.safetensors", {name: np.asarray(weights[name], np.float32) for name in weights})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (2, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        out = theirs(input_ids=torch.tensor(ids), labels=torch.tensor(ids))
        out.loss.backward()
    model = refimpl.load(folder, precision="float64")
    result = model.forward(ids, labels=ids)
    return theirs, out, result, model.backward(result)


def close(theirs: np.ndarray, ours: np.ndarray) -> bool:
    return bool(np.abs(theirs - ours).max() <= TOLERANCE * np.abs(ours).max())


def test_transformers_loads_what_is_written_and_gives_the_logits_and_the_loss(both):
    _, out, result, _ = both
    assert close(out.logits.detach().numpy(), result.logits)
    assert abs(out.loss.item() - result.loss) <= TOLERANCE * result.loss


def test_gradients_are_those_of_autograd(both):
    theirs, _, _, grads = both
    compared = 0
    for name, parameter in theirs.named_parameters():
        if name in grads:  # experts are fused there
            assert close(parameter.grad.numpy(), grads[name]), name
            compared += 1
        elif name.endswith("mlp.experts.gate_up_proj"):
            prefix, split = name.rpartition(".")[0], parameter.shape[1] // 2
            for expert, fused in enumerate(parameter.grad.numpy()):
                assert close(fused[:split], grads[f"{prefix}.{expert}.gate_proj.weight"]), (name, expert)
                assert close(fused[split:], grads[f"{prefix}.{expert}.up_proj.weight"]), (name, expert)
            compared += 1
    assert compared > 20
