"""The commands of ``xvlm``, a module for each group. Heavy packages are imported in the functions: help is at once."""

DEFAULT = "xvlm-scenes-tiny"  # the weights that come with the package
