"""Print, as pip's constraints, the lowest versions that pyproject.toml claims."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
# Not torch: it is claimed from the version on that the newest of the others are tested with.
for line in project["dependencies"] + extras["examples"] + extras["half"] + extras["test"]:
    requirement = Requirement(line)
    for specifier in requirement.specifier:
        if specifier.operator == ">=":
            marker = f"; {requirement.marker}" if requirement.marker else ""
            print(f"{requirement.name}=={specifier.version}{marker}")
# It is matplotlib's: what 3.9 calls is deprecated since 3.3, and warnings are errors in the tests.
print("pyparsing<3.3")
