"""The state of a plane that only its own rank touches, as int32 words, and the limits that size it: once, for host and kernels.

Kernels take these as ``tl.constexpr``, which each of their files makes of what it needs.
"""

GROUP_LANES = 128  # lanes (threads) of a group, 16 bytes each
GROUP_BYTES = 16 * GROUP_LANES
MAX_GROUPS = 16  # groups of a row: H <= 16384 for 16-bit dtypes, 8192 for fp32
ROW_BYTES = MAX_GROUPS * GROUP_BYTES  # the widest row that the kernels take
MAX_PROGRAMS = 1024  # programs of one launch

EPOCHS = 0  # one word a program: calls so far, modulo 2
RECORD = MAX_PROGRAMS  # what a poll that gave up was waiting for; word 0 is 0 while all is well
RECORD_BYTES = 4 * RECORD  # also in the PTX of call.spoil
PARTIALS = RECORD + 16  # per program: MAX_GROUPS sums of squares, from the programs of its row
TOPS = PARTIALS + MAX_PROGRAMS * MAX_GROUPS  # per program: MAX_GROUPS largest values, from the programs of its row
STATE_WORDS = TOPS + MAX_PROGRAMS * MAX_GROUPS

# Behind the state of a kernel with stamps, which has to be larger: for each phase and program eight int64, in nanoseconds.
STAMPS = STATE_WORDS // 2
STAMP_NAMES = ("launched", "begun", "pushed", "reduced", "received", "finished")
STAMP_WORDS = 2 * MAX_PROGRAMS * 8 * 2
