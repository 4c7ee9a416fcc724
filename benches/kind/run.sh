#!/usr/bin/env bash
# Load in a cluster that deploy/kind/up.sh makes: direct, through ztunnel and through Culvert, with the client and the server on one
# node and on two. Prints a table as `make bench` does.
#
#   run.sh [SECONDS]     of each measurement; 10
#
# Needs what up.sh needs, and jq.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${1:-10}
up=../../deploy/kind/up.sh
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# bulk NAMESPACE SERVER STREAMS: payload per second at the receiver, in Gbit/s
bulk() {
  kubectl -n "$1" exec client -c iperf3 -- iperf3 -J -c "$2" -t "$seconds" -P "$3" |
    jq '.end.sum_received.bits_per_second / 1e7 | round / 100'
}

# requests NAMESPACE SERVER CONNECTIONS KEEPALIVE: answers per second
requests() {
  kubectl -n "$1" exec client -c load -- fortio load -quiet -json - -qps 0 -c "$3" -t "${seconds}s" -keepalive="$4" \
    "http://$2:8080/echo?msg=hello" 2>/dev/null | jq '.ActualQPS | round'
}

# measure NAMESPACE: one line per figure, "name<TAB>value"
measure() {
  local server where
  for server in near far; do
    [ "$server" = near ] && where="one node" || where="two nodes"
    printf '%s: iperf3, 1 stream (Gbit/s)\t%s\n' "$where" "$(bulk "$1" "$server" 1)"
    printf '%s: iperf3, 8 streams (Gbit/s)\t%s\n' "$where" "$(bulk "$1" "$server" 8)"
    printf '%s: keep-alive requests at 1 (/s)\t%s\n' "$where" "$(requests "$1" "$server" 1 true)"
    printf '%s: keep-alive requests at 64 (/s)\t%s\n' "$where" "$(requests "$1" "$server" 64 true)"
    printf '%s: new connections at 32 (/s)\t%s\n' "$where" "$(requests "$1" "$server" 32 false)"
  done
}

for proxy in ztunnel culvert; do
  PROXY=$proxy "$up" >&2
  [ -e "$work/direct" ] || measure direct >"$work/direct"
  measure mesh | cut -f 2 >"$work/$proxy"
done
echo '| measurement | direct | ztunnel | culvert | culvert / direct | culvert / ztunnel |'
echo '|---|---:|---:|---:|---:|---:|'
paste "$work/direct" "$work/ztunnel" "$work/culvert" |
  awk -F '\t' '{ printf "| %s | %s | %s | %s | %.2f | %.2f |\n", $1, $2, $3, $4, $4 / $2, $4 / $3 }'
