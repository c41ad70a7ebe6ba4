"""The PEFT method: its registration. ``config`` has the fields, ``layer`` the adapted layer, ``model`` injection."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "TUCKER"
# transformers builds the prefix as peft_type.lower() + "_".
PREFIX = "tucker_"


def _add_peft_type() -> None:
    """Adds the member to PEFT's enum, which ``register_peft_method`` asks for and offers no way to do.

    ``type.__setattr__`` avoids the enum's own guard. It is needed from Python 3.12 on, where enum members are plain
    class attributes.
    """
    if NAME in PeftType.__members__:
        return

    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    PeftType._member_names_.append(NAME)


def register() -> None:
    """Registers ``FloraConfig`` and ``FloraModel`` with PEFT, once.

    Raises:
        ImportError: another package, or a later PEFT, has taken the method's name.
    """
    _add_peft_type()
    from flora.tuner.config import FloraConfig
    from flora.tuner.model import FloraModel

    taken = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType(NAME))
    if taken is FloraModel:
        return

    if taken is not None:
        raise ImportError(
            f"PEFT already has a method {NAME!r} ({taken.__module__}.{taken.__qualname__}), so flora-peft cannot "
            "register its own under that name; upgrade flora-peft, or install the PEFT version that its release notes "
            "name"
        )

    register_peft_method(name=NAME.lower(), config_cls=FloraConfig, model_cls=FloraModel, prefix=PREFIX)
