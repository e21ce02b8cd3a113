"""Bias update against auxiliary loss against nothing: how even is the load, and what does it cost?

    python bench/experiments/balancing.py [--seeds N] [--steps N] [--jobs N]

Published: Loss-Free Balancing (table 2), 1B parameters: perplexity 9.56 and MaxVio 0.72 with the loss, 9.50
and 0.04 with the bias; 3B: 7.97 and 0.52, 7.92 and 0.04.  Report of V3 (section 4.5.3), validation loss of
1B: 2.258 with the sequence-wise loss, 2.253 without a loss; 3B: 2.085 and 2.080.  `small_training.py` says
what is trained here, and how sure the intervals are.

In 200 steps the published gamma of 0.001 moves a bias by 0.2 at most, which is less than scores differ; a
gamma of 0.01 shows what the update does when it has the time.  MaxVio is at most 3 here (16 experts, 4
chosen): the load of a model that sends every token to the same experts.
"""

from small_training import Arm, main

ARMS = (
    Arm("nothing"),
    Arm("bias, gamma 0.001", {"bias_update_speed": 0.001}),
    Arm("bias, gamma 0.01", {"bias_update_speed": 0.01}),
    Arm("loss, alpha 0.001", {"balance_loss_weight": 0.001}),
    Arm("loss, alpha 0.01", {"balance_loss_weight": 0.01}),
)
MEASURES = ("MaxVio, held-out text", "MaxVio, training batches", "validation loss")
PUBLISHED = (
    "Published, at 1B and 3B parameters: MaxVio over the held-out text 0.72 and 0.52 with a loss (alpha "
    "0.001), 0.04 and 0.04 with the bias (Loss-Free Balancing); validation loss 2.258 and 2.085 with the "
    "sequence-wise loss, 2.253 and 2.080 with the bias (report of V3)."
)

if __name__ == "__main__":
    main(__doc__, ARMS, MEASURES, PUBLISHED, "curve of MaxVio", __file__)
