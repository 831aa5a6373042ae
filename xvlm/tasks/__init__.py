"""What a model is trained for, one file each."""

from xvlm.tasks import pretraining as pretraining
