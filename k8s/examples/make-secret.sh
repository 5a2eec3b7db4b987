#!/bin/sh
# The namespace and the Secret of k8s/README.md with random values. Does nothing to a Secret that is there.
set -eu
here=$(dirname "$0")
word() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }
kubectl apply -f "$here/../base/namespace.yaml"
if kubectl -n slipstream get secret slipstream >/dev/null 2>&1; then
  echo "The Secret slipstream is there already."
  exit 0
fi
admin=$(word 24) redis=$(word 24)
kubectl -n slipstream create secret generic slipstream \
  --from-literal=admin-key="$admin" \
  --from-literal=metrics-key="$(word 24)" \
  --from-literal=auth_token="$(word 32)" \
  --from-literal=redis-password="$redis" \
  --from-literal=redis-url="redis://slipstream:$redis@slipstream-redis:6379/0" \
  --from-literal=ray-redis-password="$(word 24)"
echo "Admin key: $admin"
