"""Strategic merge of a partial pod template into a pod, as `kubectl patch --type=strategic` does.

Objects merge key by key and null removes a key. Lists whose elements have a name of their own
(containers, env, volumes ...) merge element by element; other lists are replaced. `$patch: delete`
in an element removes it, `$patch: replace` in an object or list takes only what is given. The keys
are those of Kubernetes' core/v1 types (`patchMergeKey`). One difference: a volume that is given
again is replaced as a whole, since a volume has one source only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from shoal.api.names import GROUP

DIRECTIVE: Final = "$patch"
# List -> the field by which its elements are known. Lists that are not here are replaced.
_MERGE_KEYS: Final = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "ports": "containerPort",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "schedulingGates": "name",
    "resourceClaims": "name",
}
_REPLACED_WHOLE: Final = ("volumes",)
_METADATA: Final = ("labels", "annotations")
_PROTECTED: Final = ("restartPolicy", "hostname", "subdomain")


class OverlayError(ValueError):
    """An overlay that cannot be merged; the message names the path within it."""


def merged(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `overlay` on top; neither is changed, and the result shares what it can with
    both: treat it as frozen. OverlayError where they do not fit."""
    return _object(base, overlay, "")


def overlay_problems(overlay: Mapping[str, Any]) -> Iterator[str]:
    """What an overlay of a pod template may not touch, as `path (why)`."""
    for key in overlay:
        if key not in ("metadata", "spec"):
            yield f"{key} (a pod template has metadata and spec)"
    metadata, spec = overlay.get("metadata", {}), overlay.get("spec", {})
    for name, part in (("metadata", metadata), ("spec", spec)):
        if not isinstance(part, Mapping):
            yield f"{name} (must be an object)"
    if isinstance(metadata, Mapping):
        for key in metadata:
            if key not in _METADATA:
                yield f"metadata.{key} (Shoal sets it; only labels and annotations are open)"
        annotations = metadata.get("annotations")
        for key in annotations if isinstance(annotations, Mapping) else ():
            if key.startswith(f"{GROUP}/"):
                yield f"metadata.annotations[{key}] (Shoal sets it)"
    if isinstance(spec, Mapping):
        for key in _PROTECTED:
            if key in spec:
                yield f"spec.{key} (Shoal sets it)"


def _object(base: Mapping[str, Any], overlay: Mapping[str, Any], path: str) -> dict[str, Any]:
    directive = overlay.get(DIRECTIVE)
    if directive not in (None, "replace", "merge"):
        raise OverlayError(f"{path or 'the overlay'}: {DIRECTIVE}: {directive} is not for objects")
    result = {} if directive == "replace" else dict(base)
    for key, value in overlay.items():
        if key == DIRECTIVE:
            continue
        if key.startswith("$"):
            raise OverlayError(f"{path or 'the overlay'}: the directive {key} is not known")
        where = f"{path}.{key}".lstrip(".")
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _value(key, result.get(key), value, where)
    return result


def _value(key: str, base: Any, overlay: Any, path: str) -> Any:
    if base is not None and _shape(base) != _shape(overlay):
        raise OverlayError(f"{path}: must be {_shape(base)}")
    if isinstance(overlay, Mapping):
        return _object(base or {}, overlay, path)
    if isinstance(overlay, list):
        merge_key = _MERGE_KEYS.get(key)
        if merge_key is None:
            return overlay
        return _list(base or [], overlay, merge_key, path, whole=key in _REPLACED_WHOLE)
    return overlay


def _list(
    base: Sequence[Any], overlay: Sequence[Any], merge_key: str, path: str, *, whole: bool
) -> list[Any]:
    result = list(base)
    for index, element in enumerate(overlay):
        where = f"{path}[{index}]"
        if not isinstance(element, Mapping):
            raise OverlayError(f"{where}: must be an object")
        if element.get(DIRECTIVE) == "replace" and merge_key not in element:
            result = []
            continue
        if merge_key not in element:
            raise OverlayError(f"{where}: needs {merge_key}, by which elements are merged")
        known = element[merge_key]
        at = next((i for i, old in enumerate(result) if old.get(merge_key) == known), None)
        if element.get(DIRECTIVE) == "delete":
            if at is not None:
                del result[at]
        elif at is None:
            result.append(_object({}, element, where))
        else:
            result[at] = _object({} if whole else result[at], element, where)
    return result


def _shape(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    return "a list" if isinstance(value, list) else "a plain value"
