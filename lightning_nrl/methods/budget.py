"""How `max_time` is shared out: all shares, passes and rounds in one place.

A pass is one forward pass over all known data; the clock measures it while the data are counted. "Left" is what is left
of `max_time`. The default's stages, in order:

| stage | may take | ends |
|---|---|---|
| search of the layer, each | `SEARCH_TIME_SHARE` of what is left; half of it prepares | between two iterations |
| exact solution | `EXACT_TIME_SHARE` of what is left; `EXACT_ALONE_TIME_SHARE` if no training fits | after a round |
| trials of the training, each | `TRIAL_SHARE_OF_TIME` of what is left | between two batches |
| training on all known data | what is left but `POLISH_PASSES` | between two batches |
| polish | what is left but `JUDGING_PASSES` | `RESERVED_PASSES` before that, to go back |
| strength without calibration data | `CURVE_TIME_SHARE` of what the repair took | between two points |
| verdict | `JUDGING_PASSES` | |

An update polishes for `UPDATE_TIME_SHARE` of what is left, then searches. Merged repairs take `TIME_SHARE_OF_PARTS` for
the parts. Without `max_time`, a search takes `FIT_SHARE_OF_SEARCH` of the fit's time, and training as long as the
fit did.
"""

from __future__ import annotations

# All methods
JUDGING_PASSES = 3  # after a method: its result is judged, unseen data are counted
QUOTA_ROUNDS = 2  # runs of a method for slices that lack repairs, each with more weight on these
PASSES_PER_VISIT = 3.0  # a training step on a sample: one forward and a backward pass
POLISH_PASSES = 12.0  # a whole polish; this much time is kept for it
UPDATE_TIME_SHARE = 0.9  # the polish of an update; the rest is the search's
TIME_SHARE_OF_PARTS = 0.7  # merged repairs: the parts; the rest is for the search of the coefficients

# Searches and the exact solution in the default
SEARCH_TIME_SHARE = 0.05
EXACT_TIME_SHARE = 0.2
EXACT_ALONE_TIME_SHARE = 0.8
EPOCHS_WORTH_TIME = 5.0  # training is left time for if this many epochs fit in
MIN_SEARCH_SECONDS = 5.0  # without a limit of time
FIT_SHARE_OF_SEARCH = 0.25
UNKNOWN_FIT_SECONDS = 60.0
SOLVING_FACTOR = 3.0  # the exact solution beside one search, without a limit: contradictory data make large programmes

# Samples that a search looks at
PREPARATION_TIME_SHARE = 0.5  # of the search's time: recording, localising, the scorer
PREPARATION_PASSES = 10.0  # to prepare a sample: record, replay, forward and backward to localise
PREPARATION_SECONDS = 3e-5  # to prepare a sample, however small the network is
FEWEST_SAMPLES = 10_000  # however short the time is

# Training that goes on
FEWEST_EPOCHS = 3  # a schedule squeezed further leaves the model worse, unless the fit had fewer
FEWEST_TRIAL_EPOCHS = 2
FEWEST_LIMITED_EPOCHS = 5  # a trial in limited time is not made for less
TRIAL_SHARE = 0.2  # of the visits that the fit made: each trial
FINAL_SHARE = 0.8  # of these visits: what goes on from the best trial
TRIAL_SHARE_OF_TIME = 0.3
MAX_TRIALS = 2  # another one follows only if all of them do harm
SMALL_BUDGET = 60_000  # visits that are seconds' work for a small network
SMALL_FIT_FACTOR = 2  # after a fit below that, training may make this many times its visits
LIMITED_EPOCHS = 40  # limited time is filled with no more epochs, unless the fit had more
MIN_ANNOUNCED_SECONDS = 3.0  # what takes less is not worth a line
POLISH_FACTOR = 1.2  # training with its polish, beside training
WARM_UP_BATCHES = 3  # before the pace is even
TIMED_BATCHES = 10
PACE_TIME_SHARE = 0.1  # measuring the pace
RESERVED_TIME_SHARE = 0.1  # kept for a pace slower than measured

# Distilled steps
VISITS_PER_SAMPLE = 16  # on average, if time allows; it still pays up to here
PACE_STEPS = 4  # timed, after a first one, to find how many there is time for

# Polish
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
CURVE_TIME_SHARE = 0.1  # points that decide nothing, of what the repair took before them
FULL_CURVE_SAMPLES = 4096  # up to here all points are counted, however long that takes: reports are the same each time
MAX_POLISHES = 3  # of strengths under a limit: each may break calibration samples that were intact
MAX_POLISHED_SIZES = 4  # of a sparse patch, each half of or twice the one before

# Estimates of a diagnosis
LINEARIZED_PASSES = 40
CONVEX_SOLVES = 16.0  # ten strengths and four folds, in looks at every target alone
SCORED_SHARE = 0.15  # of all scores a swarm computes: most candidates are given up early
LADDER_SEARCHES = 1.0  # the default's searches together, beside a swarm's own
