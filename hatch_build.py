"""Installing Shoal compiles its native kernels, where there is a C++ compiler."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parent / "kernels"))
from native_build import FOLDER, compile_native


class NativeKernels(BuildHookInterface[Any]):
    """Runs before the wheel (or the editable installation) is put together."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Leaves the libraries beside their Python modules, and in the wheel."""
        libraries = compile_native()
        where = FOLDER.relative_to(Path(self.root).resolve())
        build_data["artifacts"] += [f"/{where / name}" for name in libraries]
        if libraries and version != "editable":
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
