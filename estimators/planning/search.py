"""Search for the largest or the least value that fits, in as few estimates as it takes."""

from collections.abc import Callable


def most_within(
    full: Callable[[int], int], plain: Callable[[int], int], limit: int, most: int
) -> tuple[int | None, int | None]:
    """The value below the first one that does not fit, and that one. ``plain`` is what is needed without the replay of
    the allocator, which costs little: it gives the first guess. From then on the line through the last two is
    followed, since what the replay adds is no smooth function of the value."""
    first = full(1)
    if first > limit:
        return None, None
    low, high = 1, most + 1
    x, need_x = 1, first
    guess = _reached(plain, limit - (first - plain(1)), high) if high > 2 else high
    for turn in range(64):
        if high - low <= 1:
            break
        guess = min(max(guess, low + 1), high - 1)
        need = full(guess)
        low, high = (guess, high) if need <= limit else (low, guess)
        rise = (need - need_x) * (guess - x)
        x, need_x, before = guess, need, x
        close = turn <= 7 and rise > 0
        guess = x + (limit - need) * (x - before) ** 2 // rise if close else (low + high) // 2
    return low, high if high <= most else None


def _reached(plain: Callable[[int], int], limit: int, high: int) -> int:
    """The last value below ``high`` that is within the limit, 1 being so: false position, in which an end that stays
    twice counts half (Illinois)."""

    def above(n: int) -> int:
        return plain(n) - limit

    low, at_low = 1, above(1)
    end, at_end = _end(above, low, at_low, high - 1)
    if at_end <= 0:
        return end
    stays = 0
    while end - low > 1:
        guess = min(max(low + (end - low) * -at_low // (at_end - at_low), low + 1), end - 1)
        found = above(guess)
        if found <= 0:
            low, at_low, stays = guess, found, max(stays, 0) + 1
            at_end = max(1, at_end // 2) if stays > 1 else at_end
        else:
            end, at_end, stays = guess, found, min(stays, 0) - 1
            at_low = min(-1, -(-at_low // 2)) if stays < -1 else at_low
    return low


def _end(above: Callable[[int], int], low: int, at_low: int, most: int) -> tuple[int, int]:
    """A value that is above, or ``most``, and by how much. Not ``most`` at once: of a thousand layers an estimate takes
    far longer than of those that fit."""
    end, at_end = low, at_low
    near, at_near = low, at_low
    while at_end <= 0 and end < most:
        slope = (at_end - at_near) // (end - near) if end > near else 0
        reach = end + -at_end // slope if slope > 0 else 4 * end
        near, at_near = end, at_end
        end = min(max(reach + reach // 8, end + 1), most)
        at_end = above(end)
    return end, at_end


def fewest(fits: Callable[[int], bool], most: int) -> tuple[int | None, int | None]:
    """The least value that fits, and the one below it, by doubling and halving."""
    low, high = 0, 1
    while not fits(high):
        if high >= most:
            return None, None
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high, low or None


def largest_divisor(n: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of n that fits, or 0. Gradients stay between the micro-batches of a step, so the whole may
    fit where a smaller one does not; of the others a smaller one needs less."""
    whole, *divisors = (d for d in range(n, 0, -1) if n % d == 0)
    if fits(whole):
        return whole
    if not divisors or not fits(1):
        return 0
    return next(d for d in divisors if fits(d))


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n that fits, by doubling and halving; 0 where 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 256):
        middle = (low + high) // 2
        low, high = (middle, high) if middle <= most and fits(middle) else (low, middle)
    return low
