"""TrainingConfig: values and their rules.  SPEC CONF-5."""

import json
import math

import pytest

from refimpl.config import TrainingConfig
from refimpl.errors import Invalid


def test_the_defaults_are_those_of_the_report():
    t = TrainingConfig()
    assert (t.mtp_loss_weight, t.balance_loss_weight, t.bias_update_speed) == (0.3, 1e-4, 1e-3)
    assert t.constant_tokens + t.cosine_tokens + t.final_tokens <= t.total_tokens
    assert t.total_tokens - t.constant_tokens - t.cosine_tokens - t.final_tokens == 167_000_000_000
    assert t.final_batch_sequences * t.sequence_length == 62_914_560


def test_values_survive_json():
    t = TrainingConfig(mtp_loss_weight=0, bias_update_speed_phases=[[10, 0.5], [20, 0]])
    assert t.bias_update_speed_phases == ((10, 0.5), (20, 0.0))
    assert TrainingConfig.from_dict(json.loads(json.dumps(t.to_dict()))) == t


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mtp_loss_weight", -1.0),
        ("balance_loss_weight", "1e-4"),
        ("bias_update_speed", math.nan),
        ("adam_beta1", 1.5),
        ("clip_norm", 0),
        ("warmup_steps", 2.5),
        ("batch_sequences", 0),
        ("batch_ramp_shape", "steps"),
        ("mtp_loss_weight_phases", [[1]]),
        ("mtp_loss_weight_phases", [[5, 0.1], [5, 0.2]]),
        ("mtp_loss_weight_phases", 3),
    ],
)
def test_a_wrong_value_is_refused(name, value):
    with pytest.raises(Invalid, match="training"):
        TrainingConfig.from_dict({name: value})


def test_a_wrong_name_is_refused():
    with pytest.raises(Invalid, match='training field "aux_loss_alpha" is unknown'):
        TrainingConfig.from_dict({"aux_loss_alpha": 0.001})
