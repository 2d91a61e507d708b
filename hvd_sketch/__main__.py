"""Run an unmodified Horovod script with compressed gradients.

``horovodrun -np 4 python -m hvd_sketch --compression sketch --ratio 40 train.py --its --own args``
"""

from __future__ import annotations

import sys

from hvd_sketch.frontends.run_script import main

if __name__ == "__main__":
    main(sys.argv[1:])
