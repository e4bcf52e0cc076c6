"""Whether to draft at all: as long as drafts promise enough, else on trial, more and more rarely."""

from __future__ import annotations

_GAIN_WEIGHT = 0.1  # of a new promise in the moving average; less where it is of fewer requests than these
_MANY_REQUESTS = 4
_LEAST_GAIN = 1.03  # drafts that promise less are left: times and acceptance are known no better than that
# What a batch twice as large must promise on top: with drafts, requests that began together end apart, and the last
# ones run in small batches. Seen in closed batches of 4 and 16 requests: 5 to 8% and 8 to 10% of what steps promise.
_LEAST_GAIN_PER_DOUBLING = 0.02
# And in short steps, where prompts that come one by one weigh more: seconds over those of a pass. Seen with 1 and 2
# requests whose plain steps take 1.5 ms: promises of 1.05 came to 0.96, such of 1.35 to 1.11.
_LEAST_GAIN_SECONDS = 1e-4
_TRIAL_SEARCHES = 8  # of single requests, after which a trial decides: what is promised for one token means little
_HOPELESS = 0.7  # tokens per second, over those without drafts, at which it needs no more of them
_TRIAL_SHARE = 1 / 300  # of the time, which trials take that only tell whether drafts would pay by now
_TURN_SECONDS = 1.5e-3  # that steps after one of another kind take longer, summed over a trial's two turns
_LONG_PAUSE = 8  # steps without drafting, after which what was known of it before may be out of date
_LONGEST_PAUSE = 256  # steps without drafting before it is tried again, however dear that is,
_LONGEST_PAUSE_SECONDS = 1.0  # or as many passes as take so long, if that is more
_FIRST_PLAIN_STEP = 8  # drafted steps before the first step without drafts, which tells what plain decoding costs
_PLAIN_STEP_INTERVAL = 256  # the most drafted steps between two of them: intervals double up to that
_PLAIN_STEPS_PER_LESSON = 16  # in a pause, of which one is learnt from
_COLD_SECONDS = 5e-3  # of a step: those that take less take visibly longer after steps of another kind
# so many: of steps of 1.54 ms the first one after drafts takes 1.87, the third 1.70, the fifth 1.61 and the ninth 1.55
_COLD_STEPS = 8


class Pauses:
    """Decides whether to draft at one level of load.

    Args:
        level: 0 for one request, 1 for two or three, 2 for four to seven, ...
        pass_seconds: what a forward pass of that many requests takes.
    """

    def __init__(self, level: int, pass_seconds: float) -> None:
        self.least_gain = _LEAST_GAIN + _LEAST_GAIN_PER_DOUBLING * level + _LEAST_GAIN_SECONDS / pass_seconds
        self.gain = self.least_gain
        """Tokens per second with drafts over those without, as a moving average of what choices promised."""
        self.left = 0
        """Steps left without drafting."""
        self.next_length = 1
        """Steps of the next pause: twice those of the last one, less one for every choice since that paid."""
        self.trial: list[float] | None = None
        """What was promised since a pause; None once there was enough of it to decide whether to draft on."""
        self._num_cold = 0 if pass_seconds > _COLD_SECONDS else _COLD_STEPS
        self._num_undrafted = 0  # steps since the last one with a draft at its end
        self._num_drafted = 0
        self._next_plain_step = _FIRST_PLAIN_STEP  # drafted steps after which the next one without drafts is due
        self._num_searches = 1  # of the last trial
        self._longest = max(_LONGEST_PAUSE, int(_LONGEST_PAUSE_SECONDS / pass_seconds))

    def should_draft(self) -> bool:
        """Return whether to draft after this step; counts the pauses."""
        self._num_undrafted += 1
        if self.left > 0:
            self.left -= 1
            return False
        if not self.pays():
            self.left, self.next_length = self.next_length, min(2 * self.next_length, self._longest)
            self.trial = []
            return False
        self._num_drafted += 1
        if self._num_drafted == self._next_plain_step:
            self._next_plain_step += min(self._num_drafted, _PLAIN_STEP_INTERVAL)
            self.left = self._num_cold + 1
            return False
        self._num_undrafted = 0
        return True

    def wants_plain_step(self) -> bool:
        """Return whether to learn from a step without drafts: from the last one of a pause, and one in 16 before.

        Not from those that still take longer because of the drafts before them.
        """
        # the first one without a draft at its end still verified one
        is_warm = self._num_undrafted > 1 + self._num_cold
        return is_warm and self.left % _PLAIN_STEPS_PER_LESSON == 0

    def skip_steps(self) -> int:
        """Take from a pause the steps before the next one that is learnt from, and return how many they are."""
        num_steps = max(self.left % _PLAIN_STEPS_PER_LESSON - 1, 0)
        self.left -= num_steps
        self._num_undrafted += num_steps
        return num_steps

    def is_long_over(self) -> bool:
        """Return whether a long pause has just ended: the next promise is the first one since."""
        return self.trial == [] and self.next_length > _LONG_PAUSE

    def pays(self) -> bool:
        """Return whether to go on drafting, as far as is known."""
        return self.gain >= self.least_gain or self.trial is not None

    def add_promise(self, promise: float, batch_size: int, *, is_known: bool) -> None:
        """Let a choice's tokens per second with drafts, over those without, count towards `gain`.

        Args:
            is_known: whether the costs behind it are; until then every promise counts alone.
        """
        if not is_known:
            self.gain, self.trial = promise, None
        elif self.trial is None:
            self.gain += _GAIN_WEIGHT * min(1.0, batch_size / _MANY_REQUESTS) * (promise - self.gain)
        else:
            self.trial.append(promise)
            promised = sum(self.trial) / len(self.trial)
            if len(self.trial) * batch_size >= _TRIAL_SEARCHES or promised < _HOPELESS:
                # half is what was known before: of many trials the one that ends a pause is a lucky one
                self.gain = (max(self.gain, _HOPELESS) + promised) / 2
                self._num_searches, self.trial = len(self.trial), None
        if self.trial is None and self.pays():
            self.next_length = max(1, self.next_length - 1)

    def limit(self, search_seconds: float, plain_seconds: float) -> None:
        """Let the next trial come the sooner, the less it takes in steps without drafts.

        Args:
            search_seconds: of one search.
            plain_seconds: of a step without drafts.
        """
        trial_seconds = self._num_searches * search_seconds + _TURN_SECONDS
        longest = trial_seconds / (_TRIAL_SHARE * plain_seconds)
        self.next_length = max(1, min(self.next_length, int(longest)))
