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
JUDGING_PASSES = 3  # after a method: its result is judged, unseen data are counted
QUOTA_ROUNDS = 2  # runs of a method for slices that lack repairs, each with more weight on these
POLISH_PASSES = 12.0  # a whole polish; this much time is kept for it
LEAST_POLISH_SECONDS = 0.5  # however short a pass is
POLISH_TIME_SHARE = 1 / 3  # of the time left, the most that is kept for the polish
UPDATE_TIME_SHARE = 0.9  # the polish of an update; the rest is the search's
TIME_SHARE_OF_PARTS = 0.7  # merged repairs: the parts; the rest is for the search of the coefficients

# Searches and the exact solution in the default
SEARCH_TIME_SHARE = 0.1
HURRIED_SEARCH_TIME_SHARE = 0.5  # if fewer than `FEW_EPOCHS` of training fit in
FEW_EPOCHS = 8  # in a tenth of the time of fewer, nothing can be recorded and counted
EXACT_TIME_SHARE = 0.8  # of what the first search leaves of that time
MAX_PAIRS = 1_500  # a strength that needs more rows is left out, but for the first

# Samples that a search looks at
PREPARATION_TIME_SHARE = 0.5  # of the search's time: recording, localising, the scorer
PREPARATION_PASSES = 10.0  # to prepare a sample: record, replay, forward and backward to localise
PREPARATION_SECONDS = 3e-5  # to prepare a sample, however small the network is
FEWEST_SAMPLES = 10_000  # however short the time is

# Training that goes on
LEAST_EPOCHS = 16  # after a shorter fit or none, as far as they train on no more than `SMALL_BUDGET` samples
SMALL_BUDGET = 60_000  # samples trained on, which takes a small network seconds
STARTING_SECONDS = 1.0  # of the trainers that measure the pace and train, before their first steps
WARM_UP_BATCHES = 3  # before the pace is even
TIMED_BATCHES = 10
PACE_TIME_SHARE = 0.1  # measuring the pace
RESERVED_TIME_SHARE = 0.1  # kept for a pace slower than measured
PACE_STEPS = 4  # distilled steps timed, after a first one, to find how many there is time for

# Polish
POLISH_SHARE = 2.0  # of the training's visits, the whole polish
STALLED_POLISH_SHARE = 1 / 3  # of these visits without a new low of open samples: then the best so far is the result
RESERVED_PASSES = 3.0  # kept when rounds end: where a step back leads is counted
MAX_STALLED_ROUNDS = 20  # since a start, a result, or since fewer samples were open than ever
MAX_ROUNDS = 100  # in all, where fewer and fewer samples are open
MAX_RETREATS = 4
FIRST_ENFORCING_ROUNDS = 4  # in limited time, before targets that are not right are let go; then twice as many
ENFORCING_TIME_FRACTION = 0.4  # likewise, of the time

# Convex and linearized
RECORDING_PASSES = 2.0  # to record the layer's inputs and compare its outputs with the model's
TRIAL_PASSES = 2.0  # to try a fraction of a change: its own count, and the verdict's
FIRST_ROUND_PASSES = 5.0  # the first linearization
MAX_LINEARIZATIONS = 10  # 3 to 6 were enough where all could be repaired

# After the method
CURVE_SHARE = 0.1  # of the training's visits: points of the curve over strength, which decide nothing
FULL_CURVE_SAMPLES = 4096  # up to here all points are counted
MAX_POLISHES = 3  # of strengths under a limit: each may break calibration samples that were intact
MAX_POLISHED_SIZES = 4  # of a sparse patch, each half of or twice the one before

# Estimates of a diagnosis
LINEARIZED_PASSES = 40
CONVEX_SOLVES = 16.0  # ten strengths and four folds, in looks at every target alone
SCORED_SHARE = 0.15  # of all scores a swarm computes: most candidates are given up early
LADDER_SEARCHES = 1.0  # the default's searches together, beside a swarm's own
