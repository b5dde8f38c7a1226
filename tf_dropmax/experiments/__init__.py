"""Experiments with the library: data, networks, the demo. Needs `pip install tf_dropmax[experiments]`."""
