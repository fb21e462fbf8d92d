"""What pyproject.toml cannot say: conf/ is at the top of the repository and in the wheel at secvec/conf."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["secvec*", "hydra_plugins*"]), "secvec.conf"],
    package_dir={"secvec.conf": "conf"},
    package_data={"secvec": ["py.typed", "report/*.j2", "report/*.js"], "secvec.conf": ["*.yaml", "**/*.yaml"]},
)
