"""Random numbers without state: a pure function of (seed, epoch, sample id, stream).

Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011), vectorised
over samples. Whoever asks for the numbers of a sample gets the same ones, on any rank, worker or attempt.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

_BETA_TRIES = 16
FOR_BETA = 2 * (1 + 3 * _BETA_TRIES)
"""How many uniform numbers `beta` may use."""
MAX_SEED = 2**64 - 1
_MAX_STREAM = 2**16 - 2
"""The last one, 0xFFFF, is kept for the keys of permutations (data_prep/order.py)."""


def check_seed(seed: int) -> int:
    """`seed` itself.

    Raises:
        ValueError: it is negative or does not fit 64 bits.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed = {seed} must lie between 0 and 2**64 - 1")
    return seed


def philox4x32(key: int, c0: ArrayLike, c1: ArrayLike, c2: ArrayLike, c3: ArrayLike) -> NDArray[np.uint32]:
    """Philox4x32-10 of the counters (c0, c1, c2, c3) under a 64-bit key (its low word is the first key word).

    The counters are integers in [0, 2**32) and broadcast against each other to a shape S.

    Returns:
        uint32 [4, *S]: the four output words of each counter.
    """
    x0, x1, x2, x3 = np.broadcast_arrays(*(np.asarray(c).astype(np.uint64) for c in (c0, c1, c2, c3)))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(_ROUNDS):
        p0, p1 = _MULTIPLIERS[0] * x0, _MULTIPLIERS[1] * x2
        x0, x1, x2, x3 = (
            (p1 >> _HALF) ^ x1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ x3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + _KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([x0, x1, x2, x3]).astype(np.uint32)


def uniform(seed: int, epoch: ArrayLike, ids: ArrayLike, stream: int, n: int) -> NDArray[np.float64]:
    """`n` numbers for each sample, uniform in [0, 1) with 53 random bits.

    Args:
        seed: of the run, in [0, 2**64).
        epoch: one for all, or int [B] one a sample, in [0, 2**32).
        ids: int [B], sample ids, in [0, 2**63).
        stream: which use of randomness this is (crop, mixing, ...), below 2**16 - 1; other streams are independent.
        n: numbers a sample, at most 2**17.

    Returns:
        float64 [B, n]. Element [b, i] depends on nothing but (seed, epoch[b], ids[b], stream, i).
    """
    check_seed(seed)
    assert 0 <= stream <= _MAX_STREAM, stream
    assert 0 < n <= 2**17, n
    sample = np.atleast_1d(np.asarray(ids)).astype(np.uint64)[:, None]
    epochs = np.asarray(epoch).astype(np.uint64)
    if epochs.ndim:
        epochs = epochs[:, None]
    blocks = np.arange((n + 1) // 2, dtype=np.uint64)[None, :] | np.uint64(stream << 16)
    words = philox4x32(seed, sample & _LOW, sample >> _HALF, epochs, blocks)
    # Two words make one number: the 53 bits a double holds exactly.
    high, low = (words[0::2] >> np.uint32(5)).astype(np.float64), (words[1::2] >> np.uint32(6)).astype(np.float64)
    numbers = (high * 2.0**26 + low) * 2.0**-53
    return np.ascontiguousarray(np.moveaxis(numbers, 0, -1)).reshape(len(sample), -1)[:, :n]


def beta(alpha: float, uniforms: NDArray[np.float64]) -> float:
    """A number from Beta(alpha, alpha), a function of uniform ones alone: numpy's may be another in another version.

    It is x / (x + y) of two numbers from Gamma(alpha), in logarithms, which do not vanish for a small alpha.

    Args:
        alpha: above 0.
        uniforms: [FOR_BETA] numbers in [0, 1).

    Returns:
        Between 0 and 1.
    """
    assert alpha > 0, alpha
    x, y = (_log_gamma_variate(alpha, half.tolist()) for half in np.split(uniforms, 2))
    # A difference beyond 700 is 0 or 1 in 64 bits.
    return 1 / (1 + math.exp(min(y - x, 700.0)))


def _log_gamma_variate(shape: float, uniforms: Sequence[float]) -> float:
    """The logarithm of a number from Gamma(shape, 1): Marsaglia and Tsang, "A simple method for generating gamma
    variables", ACM TOMS 26 (2000), for shape + 1, times U^(1/shape) (its section 6); normals by Box and Muller.

    Args:
        uniforms: 1 + 3 for each try, in [0, 1). A try is taken with a chance above 0.95.
    """
    d = shape + 1 - 1 / 3
    c = 1 / math.sqrt(9 * d)
    cube = 1.0  # the middle of the distribution, were every try refused: a chance below 1e-20
    for first in range(1, len(uniforms), 3):
        radius, angle, chance = uniforms[first : first + 3]
        normal = math.sqrt(-2 * math.log(1 - radius)) * math.cos(2 * math.pi * angle)
        tried = (1 + c * normal) ** 3
        if tried > 0 and math.log(1 - chance) < 0.5 * normal**2 + d - d * tried + d * math.log(tried):
            cube = tried
            break
    return math.log(d * cube) + math.log(1 - uniforms[0]) / shape
