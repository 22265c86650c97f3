"""Does what standard input asks of Helm's own code, call by call, and prints what came of each."""

import json
import sys

from helm_python import Chart, Config, HelmError
from helm_python.chart import lint, package


def answer(call):
    """What one call returns; `call` is its name and its arguments."""
    do, chart = call.pop("do"), call.pop("chart", None)
    if do == "lint":
        return lint(chart, **call)
    if do == "package":
        return package(chart, **call)
    if do == "render":
        with Chart.load(chart) as loaded:
            # As `helm install` does before it renders.
            loaded.validate_schema(call["values"])
            return loaded.render(**call)
    with Config(kubeconfig_path=call.pop("kubeconfig"), namespace=call.pop("namespace")) as config:
        arguments = [] if chart is None else [chart]
        return getattr(config, do)(*arguments, **call)


def main():
    answers = []
    for call in json.load(sys.stdin):
        try:
            answers.append({"answer": answer(call)})
        except HelmError as error:
            answers.append({"error": str(error)})
    json.dump(answers, sys.stdout)


main()
