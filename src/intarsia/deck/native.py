"""The writing of a switch as machine code, through numba: one call over all weights. An extra, ``intarsia[fast]``.

What it gains over ``index_copy_``: no call for each weight, indices of half the width, lines of the cache fetched ahead, and
two sorted lists that are merged while they are written, so that no third one need be made and kept for each pair.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, unused-ignore, misc"

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

AHEAD = 24  # units; what lies so far ahead is fetched into the cache
LINE = 64  # bytes of a line of the cache


@intrinsic
def _pointer(_, address, like):
    """The address as a pointer to entries of the dtype of an array."""

    def code(context, builder, signature, given):
        return builder.inttoptr(given[0], context.get_value_type(signature.return_type))

    return types.CPointer(like.dtype)(address, like), code


@intrinsic
def _prefetch(_, address):
    """Have the line at an address fetched, to be written. No fault is raised, whatever the address."""

    def code(context, builder, signature, given):
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(given[0], byte), number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(address), code


@intrinsic
def _copy_line(_, to, source):
    """64 bytes from one address to another, wherever they begin: a line at once, which a loop over words is not made into."""

    def code(context, builder, signature, given):
        line = ir.VectorType(ir.IntType(64), LINE // 8).as_pointer()
        at, read = (builder.inttoptr(one, line) for one in given)
        builder.store(builder.load(read, align=1), at, align=1)
        return context.get_dummy_value()

    return types.void(to, source), code


@intrinsic
def _flip_line(_, at):
    """The line of 64 bytes at an address, read and written: its lowest bits are turned over."""

    def code(context, builder, signature, given):
        line = ir.VectorType(ir.IntType(64), LINE // 8)
        place = builder.inttoptr(given[0], line.as_pointer())
        ones = ir.Constant(line, [1] * (LINE // 8))
        builder.store(builder.xor(builder.load(place, align=1), ones), place, align=1)
        return context.get_dummy_value()

    return types.void(at), code


@njit(nogil=True, inline="always")
def _put_lines(base, ahead, to, source, size):
    """Copy a run of whole lines to number ``to``; have the one with number ``ahead`` fetched."""
    for byte in range(0, size, LINE):
        _prefetch(base + np.int64(ahead) * size + byte)
    for byte in range(0, size, LINE):
        _copy_line(base + np.int64(to) * size + byte, source + byte)


def _merge(addresses, pieces, a_index, a_bits, b_index, b_bits, words, first, last):
    """Write the pieces first ... last: units of ``words`` words, a's where b has none, else b's, in the order of memory.

    pieces: rows (weight, first of a, end of a, first of b, end of b); both indices ascend within a piece. a_bits and b_bits
    are rows of words, one unit after another.
    """
    size = words * b_bits.itemsize
    for n in range(first, last):
        base = addresses[pieces[n, 0]]
        out = _pointer(base, b_bits)
        i, i_end, j, j_end = pieces[n, 1], pieces[n, 2], pieces[n, 3], pieces[n, 4]
        if words == 1:
            # Without branches: which of two random numbers is smaller, no processor guesses.
            while i < i_end and j < j_end:
                a, b = a_index[i], b_index[j]
                _prefetch(base + np.int64(a_index[min(i + AHEAD, i_end - 1)]) * size)
                _prefetch(base + np.int64(b_index[min(j + AHEAD, j_end - 1)]) * size)
                take_b = b <= a
                out[b if take_b else a] = b_bits[j] if take_b else a_bits[i]
                i += 1 if a <= b else 0
                j += 1 if take_b else 0
            while i < i_end:
                _prefetch(base + np.int64(a_index[min(i + AHEAD, i_end - 1)]) * size)
                out[a_index[i]] = a_bits[i]
                i += 1
            while j < j_end:
                _prefetch(base + np.int64(b_index[min(j + AHEAD, j_end - 1)]) * size)
                out[b_index[j]] = b_bits[j]
                j += 1
        elif size % LINE == 0:
            a_from, b_from = a_bits.ctypes.data, b_bits.ctypes.data
            while i < i_end and j < j_end:
                if b_index[j] <= a_index[i]:
                    ahead, to, source = b_index[min(j + AHEAD, j_end - 1)], b_index[j], b_from + j * size
                    i += 1 if b_index[j] == a_index[i] else 0
                    j += 1
                else:
                    ahead, to, source = a_index[min(i + AHEAD, i_end - 1)], a_index[i], a_from + i * size
                    i += 1
                _put_lines(base, ahead, to, source, size)
            # One list alone takes half the time for each run, and from the base there is one list alone.
            while i < i_end:
                _put_lines(base, a_index[min(i + AHEAD, i_end - 1)], a_index[i], a_from + i * size, size)
                i += 1
            while j < j_end:
                _put_lines(base, b_index[min(j + AHEAD, j_end - 1)], b_index[j], b_from + j * size, size)
                j += 1
        else:
            while i < i_end or j < j_end:
                if j < j_end and (i >= i_end or b_index[j] <= a_index[i]):
                    to = base + np.int64(b_index[min(j + AHEAD, j_end - 1)]) * size
                    for byte in range(0, size, LINE):
                        _prefetch(to + byte)
                    place = np.int64(b_index[j]) * words
                    for word in range(words):
                        out[place + word] = b_bits[j * words + word]
                    if i < i_end and a_index[i] == b_index[j]:
                        i += 1
                    j += 1
                else:
                    to = base + np.int64(a_index[min(i + AHEAD, i_end - 1)]) * size
                    for byte in range(0, size, LINE):
                        _prefetch(to + byte)
                    place = np.int64(a_index[i]) * words
                    for word in range(words):
                        out[place + word] = a_bits[i * words + word]
                    i += 1


def _touch(address, lines, first, last):
    """Read and write the given lines of 64 bytes, in order: the least that any switch does with them."""
    for n in range(first, last):
        _prefetch(address + np.int64(lines[min(n + AHEAD, last - 1)]) * LINE)
        _flip_line(address + np.int64(lines[n]) * LINE)


def _compiled(function: Any) -> Any:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # nowhere to keep what was compiled: it is compiled again by the next process
        return njit(nogil=True)(function)


merge = _compiled(_merge)
touch = _compiled(_touch)
