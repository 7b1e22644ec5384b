"""Plug-ins for panfm: the objective `cosine`, and a reader of volumes kept as folders of text slices."""
