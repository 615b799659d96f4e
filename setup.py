"""Packaging: everything about the project stands in settings.ini, this file only hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
names = ("train", "language", "live", "real", "bench", "scale", "dev")
extras = {name: cfg[f"{name}_requirements"].split() for name in names}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    license="Apache-2.0",
    keywords=cfg["keywords"],
    # The book's numbers travel with the package: `load_result("agent")` finds them in an installed wheel.
    packages=[*find_packages(include=["memory_notebook", "memory_notebook.*"]), "memory_notebook.results"],
    package_dir={"memory_notebook.results": "nbs/results"},
    package_data={"memory_notebook.results": ["*.json"]},
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
    zip_safe=False,
)
