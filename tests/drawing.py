"""Random values by hypothesis' words, twenty times as fast and without what costs that time.

A fuzzer makes as many inputs as it can: here a draw is a few calls, out of a `Chance`, which is
random or bytes that a fuzzer guided by coverage has changed. What hypothesis also does, no input
twice and a smaller one for each failure, is not done; tests/fuzz.py makes findings smaller itself.
"""

import random


class Unusable(Exception):
    """What was drawn is none of what was asked for, time after time."""


class Chance:
    """Numbers at random."""

    def __init__(self, seed):
        self._random = random.Random(seed)

    def below(self, count):
        return int(self._random.random() * count)

    def bytes(self, count):
        return self._random.randbytes(count)


class Given:
    """Numbers out of given bytes; zeros when these are through."""

    def __init__(self, content):
        self._content, self._place = content, 0

    def below(self, count):
        width = max(1, (count - 1).bit_length() + 7 >> 3)
        return int.from_bytes(self.bytes(width)) % count

    def bytes(self, count):
        found = self._content[self._place : self._place + count]
        self._place += count
        return found.ljust(count, b"\0")


class Strategy:
    """How values of a kind are drawn: a function of a `Chance`."""

    def __init__(self, make):
        self.make = make

    def map(self, change):
        return Strategy(lambda chance: change(self.make(chance)))

    def flatmap(self, then):
        return Strategy(lambda chance: then(self.make(chance)).make(chance))

    def filter(self, wanted):
        def some(chance):
            for _ in range(20):
                value = self.make(chance)
                if wanted(value):
                    return value
            raise Unusable

        return Strategy(some)

    def __or__(self, other):
        return one_of(self, other)


def just(value):
    return Strategy(lambda _: value)


def sampled_from(values):
    values = list(values)
    return Strategy(lambda chance: values[chance.below(len(values))])


def integers(least, most):
    return Strategy(lambda chance: least + chance.below(most - least + 1))


def booleans():
    return sampled_from([False, True])


def binary(max_size):
    return Strategy(lambda chance: chance.bytes(chance.below(max_size + 1)))


def one_of(*strategies):
    return Strategy(lambda chance: strategies[chance.below(len(strategies))].make(chance))


def tuples(*strategies):
    return Strategy(lambda chance: tuple(each.make(chance) for each in strategies))


def lists(strategy, min_size, max_size):
    sizes = integers(min_size, max_size)
    return Strategy(lambda chance: [strategy.make(chance) for _ in range(sizes.make(chance))])


def sets(strategy, max_size):
    return lists(strategy, 0, max_size).map(set)


def composite(function):
    """Turn a function of `draw` and more into one of the rest that returns a strategy."""

    def given(*arguments, **options):
        def make(chance):
            return function(lambda strategy: strategy.make(chance), *arguments, **options)

        return Strategy(make)

    return given
