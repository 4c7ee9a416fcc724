"""Holds manifests, on standard input, against the schemas of Kubernetes (strict: unknown fields are faults) and, for resources of others,
against those beside this file. Prints each fault and how many documents there were.

The interpreter finds kubernetes-validate by PYTHONPATH, which `.ci/kubetools` tells.
"""

import json
import pathlib
import sys

import jsonschema
import kubernetes_validate
import yaml

HERE = pathlib.Path(__file__).parent
VERSIONS = ("1.30", "1.37")


def faults(document):
    own = HERE / f"{document['kind']}.json"
    if own.exists():
        validator = jsonschema.Draft7Validator(json.loads(own.read_text()))
        for fault in validator.iter_errors(document):
            yield f"{fault.json_path}: {fault.message}"
        return
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except jsonschema.ValidationError as fault:
            yield f"Kubernetes {version}: {'.'.join(map(str, fault.path))}: {fault.message}"
        except kubernetes_validate.SchemaNotFoundError as fault:
            yield fault.message


documents = [document for document in yaml.safe_load_all(sys.stdin) if document]
bad = 0
for document in documents:
    name = f"{document['kind']} {document.get('metadata', {}).get('name', '')}"
    for fault in faults(document):
        print(f"{name}: {fault}")
        bad += 1
print(f"{len(documents)} documents")
sys.exit(bad > 0)
