{{/*
The variables of the proxy, as a list in JSON under the key `env`. Each is there once: what `env` sets replaces what the chart would.
*/}}
{{- define "culvert.env" -}}
{{- $v := .Values -}}
{{- $istiod := printf "istiod%s.%s.svc:15012" (ternary (printf "-%s" $v.revision) "" (ne $v.revision "")) $v.istioNamespace -}}
{{- $json := ternary "json" "" $v.logAsJson -}}
{{- $plain := list
  (list "CA_ADDRESS" ($v.caAddress | default $istiod))
  (list "XDS_ADDRESS" ($v.xdsAddress | default $istiod))
  (list "LOG_FORMAT" $json)
  (list "NETWORK" $v.network)
  (list "RUST_LOG" $v.logLevel)
  (list "RUST_BACKTRACE" "1")
  (list "ISTIO_META_CLUSTER_ID" ($v.multiCluster.clusterName | default "Kubernetes"))
  (list "INPOD_ENABLED" "true")
  (list "TERMINATION_GRACE_PERIOD_SECONDS" (int $v.terminationGracePeriodSeconds))
-}}
{{- $fields := list
  (list "POD_NAME" (dict "fieldRef" (dict "fieldPath" "metadata.name")))
  (list "POD_NAMESPACE" (dict "fieldRef" (dict "fieldPath" "metadata.namespace")))
  (list "NODE_NAME" (dict "fieldRef" (dict "fieldPath" "spec.nodeName")))
  (list "INSTANCE_IP" (dict "fieldRef" (dict "fieldPath" "status.podIP")))
  (list "SERVICE_ACCOUNT" (dict "fieldRef" (dict "fieldPath" "spec.serviceAccountName")))
-}}
{{- $metadata := list -}}
{{- range $name, $value := $v.meshConfig.defaultConfig.proxyMetadata -}}
  {{- $metadata = append $metadata (list $name $value) -}}
{{- end -}}
{{- $fields = append $fields (list "ZTUNNEL_CPU_LIMIT" (dict "resourceFieldRef" (dict "resource" "limits.cpu"))) -}}
{{- $own := include "culvert.env.own" . | fromJsonArray -}}
{{- $crl := ternary (list (list "CRL_PATH" "/var/run/secrets/istio/crl/ca-crl.pem")) (list) $v.peerCaCrl.enabled -}}

{{- $list := list -}}
{{- range concat $plain $metadata $own $crl -}}
  {{- if not (or (hasKey $v.env (index . 0)) (eq (include "culvert.text" (index . 1)) "")) -}}
    {{- $list = append $list (dict "name" (index . 0) "value" (include "culvert.text" (index . 1))) -}}
  {{- end -}}
{{- end -}}
{{- range $fields -}}
  {{- if not (hasKey $v.env (index . 0)) -}}
    {{- $list = append $list (dict "name" (index . 0) "valueFrom" (index . 1)) -}}
  {{- end -}}
{{- end -}}
{{- range $name, $value := $v.env -}}
  {{- if not (kindIs "invalid" $value) -}}
    {{- $list = append $list (dict "name" $name "value" (include "culvert.text" $value)) -}}
  {{- end -}}
{{- end -}}
{{- dict "env" $list | toJson -}}
{{- end -}}

{{/* Those of our own values and of the resources; an empty value leaves the proxy its default. */}}
{{- define "culvert.env.own" -}}
{{- $v := .Values -}}
{{- $resources := $v.resources | default dict -}}
{{- $namespaces := list -}}
{{- range $namespace, $mode := $v.sameNode.namespaces -}}
  {{- $namespaces = append $namespaces (printf "%s=%s" $namespace $mode) -}}
{{- end -}}
{{- $own := list
  (list "ZTUNNEL_RESOURCE_CPU_LIMIT" (($resources.limits | default dict).cpu | default ""))
  (list "ZTUNNEL_RESOURCE_CPU_REQUEST" (($resources.requests | default dict).cpu | default ""))
  (list "ZTUNNEL_WORKER_THREADS" $v.workerThreads)
  (list "MEMORY_BUDGET" $v.memoryBudget)
  (list "STATE_DIR" (ternary "" "/var/lib/culvert" (eq $v.state.type "none")))
  (list "STATE_KEYS" (ternary "/run/culvert" "" $v.state.keys))
  (list "CORE_DUMPS" (ternary "true" "" $v.coreDumps))
  (list "MAX_FLOWS_PER_POD" $v.limits.flowsPerPod)
  (list "MAX_HANDSHAKES_PER_POD" $v.limits.handshakesPerPod)
  (list "MAX_HANDSHAKES_PER_PEER" $v.limits.handshakesPerPeer)
  (list "HTTP2_MAX_STREAMS" $v.limits.streamsPerConnection)
  (list "HTTP2_MAX_HEADER_BYTES" $v.limits.headerBytes)
  (list "HTTP2_MAX_CONTROL_FRAMES" $v.limits.controlFramesPerSecond)
  (list "HTTP2_MAX_RESETS" $v.limits.resetsPerSecond)
  (list "DESCRIPTOR_RESERVE" $v.limits.descriptorReserve)
  (list "LISTEN_BACKLOG" $v.limits.listenBacklog)
  (list "SAME_NODE" (ternary "" $v.sameNode.mode (eq $v.sameNode.mode "hbone")))
  (list "SAME_NODE_NAMESPACES" (join "," $namespaces))
  (list "METRICS_LABELS" (ternary "" $v.metrics.labels (eq $v.metrics.labels "full")))
  (list "METRICS_MAX_SERIES" (ternary "" (int $v.metrics.maxSeries) (eq (int $v.metrics.maxSeries) 10000)))
  (list "OTEL_EXPORTER_OTLP_ENDPOINT" $v.otlp.endpoint)
  (list "OTEL_TRACES_SAMPLER_ARG" (ternary $v.otlp.ratio "" (ne $v.otlp.endpoint "")))
-}}
{{- with $v.openbao -}}
  {{- if .enabled -}}
    {{- $own = concat $own (list
      (list "CA_PROVIDER" "openbao")
      (list "OPENBAO_ADDRESS" .address)
      (list "OPENBAO_NAMESPACE" .namespace)
      (list "OPENBAO_MOUNT" .mount)
      (list "OPENBAO_ROLE" .role)
      (list "OPENBAO_ROOT_MOUNTS" (join "," .rootMounts))
      (list "OPENBAO_AUTH_METHOD" .auth.method)
      (list "OPENBAO_AUTH_MOUNT" .auth.mount)
      (list "OPENBAO_AUTH_ROLE" .auth.role)
      (list "OPENBAO_JWT_SOURCE" .jwtSource)
      (list "OPENBAO_JWT_AUDIENCE" .auth.audience)
      (list "OPENBAO_POLL_INTERVAL" .pollInterval)) -}}
  {{- end -}}
{{- end -}}
{{- toJson $own -}}
{{- end -}}

{{/* A scalar as text; whole numbers without an exponent. */}}
{{- define "culvert.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- printf "%.0f" . -}}
{{- else -}}
{{- toString . -}}
{{- end -}}
{{- end -}}
