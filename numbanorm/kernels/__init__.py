"""Every compiled kernel.

A kernel's first argument, ``threads``, says which share of its tasks a call does, or that all are
to be shared out between threads, see :mod:`numbanorm.numba_ext.launch`.

Kernels see arrays of two to four axes and never an axis argument:

rows
    ``x`` is (P, L): piece p is the contiguous row p.
columns
    ``x`` is (A, L, C): piece (a, c) is a column; its neighbours in memory are other pieces.
element rows
    ``x`` is (M, D): row i is a statistics group, and each of its D elements has a weight.
element columns
    ``x`` is (A, D, B): each column is a statistics group, and row i of its D has weight i.
group rows
    ``x`` is (A, R, B, L): the R rows of each of A * B statistics groups have a weight each.
group columns
    ``x`` is (A, L, C): some columns next to each other are a statistics group.

Statistics are taken around the first element of a piece and accumulated in float64, in one
pass. The shift bounds the cancellation (it is an element of the data, so m2 >= (x0 - mean)**2)
and makes constant data exact at any offset; sums in float64 still run at the speed of memory.

A long axis L is cut into parts, whose length depends on the shape alone, and each part has an entry
of its own in the result: the bits do not depend on the number of threads.

``flat_slice`` and ``load`` of None are None, as a mask may be. A coefficient is a number, or a row
of numbers: ``load`` makes a vector of either, and of a record of them a record of vectors.

Several numbers of each piece, or of each group, are the rows of one array, as each array argument
adds to the time of a call. See :func:`numbanorm.numba_ext.views.unstack`.

``streamed`` says whether the output is written by streaming (non-temporal) stores, see
:mod:`numbanorm.numba_ext.lines`.
"""
