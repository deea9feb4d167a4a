"""The budget of a repair: all time shares, visits, passes and rounds.

Without `max_time` the limits count visits and rounds, so a busy machine changes nothing. A visit is
one forward pass of one sample; a training step on a sample counts as `FORWARD_BACKWARD` visits. A
pass visits all known samples once.

| stage of the default | limit | share of `max_time` |
|---|---|---|
| search, exact solution | iterations of the searcher, `MAX_PAIRS` | `SEARCH_TIME_SHARE` |
| training | its epochs over all known data | what is left, without the reserve for the polish |
| polish after a training | the visits of the training | what is left, without `JUDGING_PASSES` |
| polish alone | `POLISH_SHARE` times as many visits | the same |
| verdict | `JUDGING_PASSES` | |

If there is time for fewer than `FEW_EPOCHS` of training, the searches get
`HURRIED_SEARCH_TIME_SHARE`. If no training fits, they get all time. A search that was cut runs
again if the training leaves time. The reserve for the polish is `POLISH_PASSES`, but at most the
pass that counts its result and `POLISH_TIME_SHARE` of the other time left. Where a recorded head
restores what is broken, it is that pass alone. An update polishes for `UPDATE_TIME_SHARE` of the
time left, then searches.
"""

from __future__ import annotations

# All methods
FORWARD_BACKWARD = 3.0  # visits of a training step on a sample
JUDGING_PASSES = 1  # reserved to judge a method's result; the time of unseen data is added
QUOTA_ROUNDS = 2  # reruns of a method with more weight on slices that miss their quota
POLISH_PASSES = 12.0  # reserved for a polish during the training
LEAST_POLISH_SECONDS = 0.5  # minimum of this reserve
POLISH_TIME_SHARE = 1 / 3  # maximum of this reserve, without the count of the result
UPDATE_TIME_SHARE = 0.9  # for the polish of an update; its search gets the rest
TIME_SHARE_OF_PARTS = 0.7  # to repair the parts; the search of the coefficients gets the rest

# Searches and the exact solution in the default
SEARCH_TIME_SHARE = 0.1
HURRIED_SEARCH_TIME_SHARE = 0.5  # if there is time for fewer than `FEW_EPOCHS` of training
EPOCHS_BEFORE_EXACT = 2  # if so many do not fit, the exact solution comes before the training
FEW_EPOCHS = 8  # of a training with fewer epochs, a tenth of the time is too short for a search
LONE_SEARCH_TIME_SHARE = 1 / 4  # if no training follows
# Of the time left, with its polish; `exact` and `push` get the rest. If there is time for fewer
# than `FEW_EPOCHS`, the training gets all.
TRAINING_TIME_SHARE = 0.7
EXACT_TIME_SHARE = 0.5  # of the time left
PUSH_TIME_SHARE = 0.5  # of the time left, without the held-out samples
PUSH_SHARE = 0.25  # of the visits of the training, for each polish of a push
MAX_PAIRS = 1_500  # `Convex.max_pairs` in the default

# Samples of a search
PREPARATION_TIME_SHARE = 0.5  # of the search's time, for recording, localising and the scorer
PREPARATION_PASSES = 3.0  # visits to prepare a sample that is not recorded yet
PREPARATION_SECONDS = 3e-5  # added per sample, whatever the size of the network
# A search uses at least these many, however short the time is, and no more if a training follows.
FEWEST_SAMPLES = 10_000

# Continued training
LEAST_EPOCH = 1 / 2  # under `max_time`; steps on fewer samples repair hardly anything
LEAST_EPOCHS = 16  # if the original training was shorter; limited to `SMALL_BUDGET` visits
SMALL_BUDGET = 60_000  # visits that a small network makes in seconds
SMALL_NETWORK = 1_000_000  # parameters; each sample of a larger network counts as several
STARTING_SECONDS = 1.0  # start-up of the trainers that measure the pace and train
WARM_UP_BATCHES = 3  # not timed, since the first batches are slower
TIMED_BATCHES = 10
PACE_TIME_SHARE = 0.1  # at most, to measure the pace
RESERVED_TIME_SHARE = 0.1  # reserve for a slower pace than measured
PACE_STEPS = 4  # steps of `distill` that are timed, after a first step that is not

# Rounds of a training (`TrainingRounds`)
ROUND_SHARE = 3 / 8  # of the epochs of the original training
LAST_ROUND_SHARE = 3 / 4
FEWEST_ROUNDS = 2  # before the last round, unless held-out samples lose
MOST_ROUNDS = 6  # before the last round: the training makes at most three times its epochs
EASY_SHARE = 4 / 5  # of the passed samples are easy
EASY_VISITS = 1 / 2
BROKEN_VISITS = 3.0
DOUBTED_VISITS = 1 / 5

# Polish
POLISH_SHARE = 2.0  # maximum of a polish, as a multiple of the training's visits
# Of the training's visits. A polish stops after that many without fewer violated samples.
STALLED_POLISH_SHARE = 1 / 3
RESTORING_SHARE = 1 / 2  # of the visits, added to restore what pushing has broken at their end
RESERVED_PASSES = 1.0  # reserved after the rounds, to count the result
MAX_STALLED_ROUNDS = 20  # without a result or a new low of violated samples
MAX_ROUNDS = 100  # in total, even while fewer and fewer samples are violated
MAX_RETREATS = 4
# With `max_time`, wrong targets are then not pushed; next time after twice as many.
FIRST_ENFORCING_ROUNDS = 4
ENFORCING_TIME_FRACTION = 0.4  # the same limit as a share of the time left

# Convex
RECORDING_PASSES = 2.0  # to record the layer and compare its output with the logits
TRIAL_PASSES = 2.0  # to count one fraction of a change, and to judge it

# After the method
MAX_POLISHES = 3  # of changes scaled by different strengths; a polish may break calibration samples
MAX_POLISHED_SIZES = 4  # of a sparse patch; each is half or twice the size before

# Estimates of a diagnosis
CONVEX_SOLVES = 16.0  # time of `convex` relative to one solution for each target alone
SCORED_SHARE = 0.15  # of all scores of a swarm; most candidates are rejected early
LADDER_SEARCHES = 1.0  # time of the default's searches relative to that of `swarm`
