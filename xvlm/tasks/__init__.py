"""What a model is trained for, one file each."""

from xvlm.tasks import captioning as captioning
from xvlm.tasks import grounding as grounding
from xvlm.tasks import nlvr as nlvr
from xvlm.tasks import pretraining as pretraining
from xvlm.tasks import retrieval as retrieval
from xvlm.tasks import vqa as vqa
