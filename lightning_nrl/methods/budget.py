"""The budget of a repair: all time shares, visits, passes and rounds.

Without `max_time` the limits count visits and rounds, so a busy machine changes nothing. A visit is one forward pass of
one sample; a training step counts `FORWARD_BACKWARD` visits. A pass is one visit of all known samples.

| stage of the default | limit | share of `max_time` |
|---|---|---|
| search, exact solution | iterations of the searcher, `MAX_PAIRS` | `SEARCH_TIME_SHARE`; all if no training fits |
| training | the visits of the fit: its epochs over all known data | all but the polish's reserve |
| polish | `POLISH_SHARE` of these visits | what is left but `JUDGING_PASSES` |
| curve over strength | `CURVE_SHARE` of these visits | what is left |
| verdict | `JUDGING_PASSES` | |

If fewer than `FEW_EPOCHS` of training fit in, the searches get `HURRIED_SEARCH_TIME_SHARE`. A cut search runs again in
the time that training leaves. The polish's reserve is `POLISH_PASSES`, but at most `POLISH_TIME_SHARE` of the time
left. An update polishes for `UPDATE_TIME_SHARE` of the time left, then searches. Merged repairs spend
`TIME_SHARE_OF_PARTS` on their parts.
"""

from __future__ import annotations

# All methods
FORWARD_BACKWARD = 3.0  # visits of a training step on a sample
JUDGING_PASSES = 3  # after a method, to judge its result and count unseen data
QUOTA_ROUNDS = 2  # reruns of a method with more weight on slices that lack repairs
POLISH_PASSES = 12.0  # time reserved for a polish
LEAST_POLISH_SECONDS = 0.5  # however short a pass is
POLISH_TIME_SHARE = 1 / 3  # of the time left, limit of the polish's reserve
UPDATE_TIME_SHARE = 0.9  # the polish of an update; the rest is the search's
TIME_SHARE_OF_PARTS = 0.7  # the parts of merged repairs; the rest searches the coefficients

# Searches and the exact solution in the default
SEARCH_TIME_SHARE = 0.1
HURRIED_SEARCH_TIME_SHARE = 0.5  # if fewer than `FEW_EPOCHS` of training fit in
FEW_EPOCHS = 8  # a tenth of the time of fewer is too short for a search
EXACT_TIME_SHARE = 0.8  # of the time that the first search leaves
MAX_PAIRS = 1_500  # strengths with more rows are skipped, except the first

# Samples of a search
PREPARATION_TIME_SHARE = 0.5  # of the search's time: recording, localising, the scorer
PREPARATION_PASSES = 10.0  # to prepare a sample: record, replay, forward and backward to localise
PREPARATION_SECONDS = 3e-5  # to prepare a sample, however small the network is
FEWEST_SAMPLES = 10_000  # however short the time is

# Continued training
LEAST_EPOCHS = 16  # after a shorter fit or none, up to `SMALL_BUDGET` samples
SMALL_BUDGET = 60_000  # visits that take a small network seconds
STARTING_SECONDS = 1.0  # start-up of the trainers that measure the pace and train
WARM_UP_BATCHES = 3  # before the pace is steady
TIMED_BATCHES = 10
PACE_TIME_SHARE = 0.1  # measuring the pace
RESERVED_TIME_SHARE = 0.1  # reserve for a slower pace than measured
PACE_STEPS = 4  # timed distilled steps, after a first one

# Polish
POLISH_SHARE = 2.0  # of the training's visits, the whole polish
STALLED_POLISH_SHARE = 1 / 3  # of these visits without fewer violated samples, then it stops
RESERVED_PASSES = 3.0  # reserve at the end of the rounds, for the step back
MAX_STALLED_ROUNDS = 20  # since a start, a result, or a new low of violated samples
MAX_ROUNDS = 100  # in total, while ever fewer samples are violated
MAX_RETREATS = 4
FIRST_ENFORCING_ROUNDS = 4  # in limited time, before failing targets are suspended; then twice as many
ENFORCING_TIME_FRACTION = 0.4  # likewise, of the time

# Convex and linearized
RECORDING_PASSES = 2.0  # to record the layer and compare its outputs with the model's
TRIAL_PASSES = 2.0  # to try a fraction of a change: its count, and the verdict's
FIRST_ROUND_PASSES = 5.0  # the first linearization
MAX_LINEARIZATIONS = 10  # 3 to 6 usually suffice

# After the method
CURVE_SHARE = 0.1  # of the training's visits, for the curve over strength
FULL_CURVE_SAMPLES = 4096  # up to this many, all points are counted
MAX_POLISHES = 3  # of strengths under a limit; each may break intact calibration samples
MAX_POLISHED_SIZES = 4  # of a sparse patch, each half of or twice the one before

# Estimates of a diagnosis
LINEARIZED_PASSES = 40
CONVEX_SOLVES = 16.0  # ten strengths and four folds, in solves of every target alone
SCORED_SHARE = 0.15  # of a swarm's scores: most candidates are rejected early
LADDER_SEARCHES = 1.0  # of the default's searches, relative to a swarm's
