"""What a step costs on a GPU, what that is made of, and whether its results are those of the processor.

``python -m benchmarks.gpu --minutes 5`` writes a row for each measurement to ``benchmarks/results/gpu.json`` as soon
as it is made: what was done (``op``) by what (``impl``) on which ``device``, the coordinates ``d``, medians of the
``seconds`` until the device was done and of the ``host_seconds`` until the call returned, those of one copy of d
float32 (``copy_seconds``), the ``passes`` over 4 d bytes that would take as long, how often the host had to wait for
the device (``waits``), how many kernels and copies were launched (``launches``), and the most device memory in use
(``peak_bytes``, with gradients, memory and all else that the measurement needs), and of the kernels that took longest
the name, the number of launches and the microseconds in all (``kernels``). A row with ``failed`` tells why
there is no number, one with ``missing`` that there was no time for it.

The second-level cache is overwritten before every timed call, for in a training other work would do the same.
"""
