"""Starts the command line: `python -m tf_dropmax.experiments COMMAND`.

`python PATH/tf_dropmax/experiments COMMAND` is the same without the start-up messages of
TensorFlow. With `-m`, Python imports `tf_dropmax`, and with it TensorFlow, before this file.
"""

import contextlib
import os
import sys
import tempfile
from pathlib import Path


@contextlib.contextmanager
def _without_messages():
    """Hides what TensorFlow's C++ code writes to stderr, unless there is an exception."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # From now on, fatal errors only.
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as hidden:
        os.dup2(hidden.fileno(), 2)
        try:
            yield
        except BaseException:
            hidden.seek(0)
            os.write(stderr, hidden.read())
            raise
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)


if __name__ == "__main__":
    if not __package__:  # Started by its path.
        sys.path[0] = str(Path(__file__).resolve().parents[2])
    with _without_messages():
        from tf_dropmax.experiments.cli import main
    sys.exit(main())
