"""The hub is asked once: a machine without a network should say so at once, and not after a minute
of retries."""

from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError


def ask_once(path, kind="model"):
    """Where `path` is no folder and the hub is silent, only its cache is read from here on."""
    if Path(path).exists() or constants.HF_HUB_OFFLINE:
        return
    try:
        getattr(HfApi(), f"{kind}_info")(path, timeout=10)
    except HfHubHTTPError:
        return  # an answer, if a bad one: the caller will meet it
    except Exception:
        constants.HF_HUB_OFFLINE = True
