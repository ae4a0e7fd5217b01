"""What commands read of the server's answers. An answer without it comes from no Blockyard server.

What a command merely prints is not named here: a newer server may tell more, an older one less.
"""

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from types import UnionType

Shape: TypeAlias = "type | UnionType | Mapping[str, Shape] | list[Shape]"  # a list has one: that of each of its items

USER: Shape = {"sub": str, "name": str, "role": str}
APP: Shape = {
    "id": str,
    "name": str,
    "status": str,
    "enabled": bool,
    "access_type": str,
    "title": str,
    "url": str,
    "active_bundle": str | None,
}
APPS: Shape = {"apps": [APP], "total": int}
ACCEPTED: Shape = {"bundle_id": str, "task_id": str}
TASK: Shape = {"status": str}
BUNDLES: Shape = {
    "bundles": [{"id": str, "status": str, "uploaded_at": str, "deployed_by": str, "pinned": bool}],
}
RUNTIME: Shape = {
    "workers": [
        {
            "id": str,
            "status": str,
            "bundle_id": str,
            "started_at": str,
            "sessions": list,
            "stats": dict | None,
            "limits_hit": list,
            "end_reason": str | None,
        }
    ],
}
TOKENS: Shape = {
    "tokens": [{"id": str, "name": str, "created_at": str, "expires_at": str, "last_used_at": str | None}],
}
NEW_TOKEN: Shape = {"token": str}
CHECKS: Shape = {"severity": str, "checks": [{"name": str, "severity": str, "fact": str, "remedy": str}]}
STATUS: Shape = {
    "version": str,
    "backend": str,
    "spawner": {"connected": bool, "unprivileged": bool | None, "uids_free": int | None, "controllers": list},
    "workers": {"running": int, "max": int},
    "unit": dict | None,
}

_DEEPEST = 64  # levels: what could be read might be too deep to be printed


def is_shallow(answer: object) -> bool:
    """Tell whether an answer's lists and objects are nested as little as a server's are."""
    level = [answer]
    for _ in range(_DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [*itertools.chain.from_iterable(inner)]
    return not level


def fits(answer: object, shape: Shape) -> bool:
    """Tell whether an answer has at least what a shape names."""
    if isinstance(shape, Mapping):
        return isinstance(answer, dict) and all(
            key in answer and fits(answer[key], part) for key, part in shape.items()
        )
    if isinstance(shape, list):
        return isinstance(answer, list) and all(fits(one, shape[0]) for one in answer)
    return isinstance(answer, shape)
