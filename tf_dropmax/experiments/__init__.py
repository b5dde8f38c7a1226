"""The experiments: a demo, the paper's comparison, and measurements of speed.

They need `pip install 'tf_dropmax[experiments]'`. The commands are in `__main__`.
"""
