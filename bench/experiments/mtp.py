"""MTP on and off: the main model's loss, and how often a drafted second token would be accepted.

    python bench/experiments/mtp.py [--seeds N] [--steps N] [--jobs N]

Published (report of V3, table 4 and section 5.4.3): bits per byte on Pile-test 0.729 without and 0.729 with
one module (15.7B parameters), 0.658 and 0.657 (228.7B); the second token is accepted in 85 to 90%.  Here a
token counts as accepted when it is the main model's most probable one after the true tokens.
"""

from small_training import Arm, main

_V3 = {"bias_update_speed": 0.001, "balance_loss_weight": 0.0001}
ARMS = (
    Arm("without MTP", _V3),
    Arm("one module, lambda 0.3", {**_V3, "mtp_loss_weight": 0.3}, 1),
)
MEASURES = (
    "validation loss",
    "acceptance, %",
    "module right, %",
    "main model right, %",
    "MTP loss",
)
PUBLISHED = (
    "Published: 0.729 and 0.729 bits per byte without and with MTP at 15.7B parameters, 0.658 and 0.657 at "
    "228.7B; the second token is accepted in 85 to 90%."
)

if __name__ == "__main__":
    main(__doc__, ARMS, MEASURES, PUBLISHED, "curve of loss", __file__)
