"""The losses: `total` has the table of their terms and the sum, `contrastive` and `box_loss` the terms.

`shard` defines the input and the output of a term. `matching` assigns queries to regions. `streaming`
gathers the texts of all devices and compares rows with them.
"""

from grain_jax.losses.layout import GroupLayout, make_layout
from grain_jax.losses.shard import GroupMean, Mean, Shard, Targets, Term, TermOutput
from grain_jax.losses.total import TERMS, Losses, LossTerm, labels_of, terms_of, total_loss
