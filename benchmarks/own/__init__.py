"""A data set of one's own, `--data FILE.npz`, and networks of one's own, `--networks module:function`."""
