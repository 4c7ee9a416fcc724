{{/*
Puts the values together: everything after this reads .Values and finds all keys there. All templates of the chart share the context,
so the first one does it for all.
*/}}
{{- define "culvert.prepare" -}}
{{- if hasKey .Values "_defaults" -}}
  {{- $defaults := deepCopy (get .Values "_defaults") -}}
  {{- $user := omit .Values "_defaults" "global" -}}
  {{- $global := dict -}}
  {{- range $key, $value := .Values.global | default dict -}}
    {{- if hasKey $defaults $key -}}
      {{- $_ := set $global $key $value -}}
    {{- end -}}
  {{- end -}}
  {{- $chosen := mergeOverwrite (dict) $global $user -}}
  {{- $profile := include "culvert.profile" (list . "profile" $chosen.profile (list "ambient" "n100")) | fromYaml -}}
  {{- $platform := include "culvert.profile" (list . "platform" $chosen.platform (list "gke" "k3d" "k3s" "microk8s" "minikube" "openshift")) | fromYaml -}}
  {{- $_ := set . "Values" (mergeOverwrite $defaults $profile $platform $global $user) -}}
  {{- include "culvert.check" . -}}
{{- end -}}
{{- end -}}

{{/* The file of a profile or platform, of which some need none: (list CONTEXT KIND NAME KNOWN). */}}
{{- define "culvert.profile" -}}
{{- $name := index . 2 -}}
{{- if $name -}}
  {{- if not (has $name (index . 3)) -}}
    {{- fail (printf "%s: %q is not known; there are: %s" (index . 1) $name (join ", " (index . 3))) -}}
  {{- end -}}
  {{- (index . 0).Files.Get (printf "profiles/%s.yaml" $name) -}}
{{- end -}}
{{- end -}}

{{/* What the schema cannot tell: values that do not go together. */}}
{{- define "culvert.check" -}}
{{- $v := .Values -}}
{{- with $v.openbao -}}
  {{- if .enabled -}}
    {{- if not (hasPrefix "https://" .address) -}}
      {{- fail (printf "openbao.address: %q is no address of OpenBao, such as https://openbao.vault.svc:8200; the proxy speaks https only" .address) -}}
    {{- end -}}
    {{- if $v.caAddress -}}
      {{- fail "caAddress and openbao.enabled: certificates come from one of them" -}}
    {{- end -}}
    {{- if and .caConfigMap .caSecret -}}
      {{- fail "openbao.caConfigMap and openbao.caSecret: the roots of OpenBao's certificate come from one of them" -}}
    {{- end -}}
    {{- if not (or .caConfigMap .caSecret (hasKey $v.env "OPENBAO_ROOT_CA")) -}}
      {{- fail "openbao: name the roots of OpenBao's own certificate in caConfigMap or caSecret; the image has no roots of a system" -}}
    {{- end -}}
    {{- if eq .jwtSource "kubernetes" -}}
      {{- if ne .auth.method "jwt" -}}
        {{- fail "openbao.jwtSource: tokens of workloads log in by openbao.auth.method jwt" -}}
      {{- end -}}
      {{- if not .tokenNamespaces -}}
        {{- fail "openbao.tokenNamespaces: name the namespaces for whose accounts the proxy may have tokens made" -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if and (eq $v.state.type "hostPath") (not (hasPrefix "/" $v.state.hostPath)) -}}
  {{- fail (printf "state.hostPath: %q is not an absolute path" $v.state.hostPath) -}}
{{- end -}}
{{- if and $v.state.keys (eq $v.state.type "none") -}}
  {{- fail "state.keys: certificates are of no use to a proxy that knows no mesh; set state.type, too" -}}
{{- end -}}
{{- if and $v.state.keys (not (hasPrefix "/" $v.state.keysHostPath)) -}}
  {{- fail (printf "state.keysHostPath: %q is not an absolute path" $v.state.keysHostPath) -}}
{{- end -}}
{{- $bytes := include "culvert.bytes" ($v.memoryBudget | default 0) | float64 -}}
{{- if and (gt $bytes 0.0) (lt $bytes 33554432.0) -}}
  {{- fail (printf "memoryBudget: %v is below what the proxy needs; at least 32Mi, or 0 for no budget" $v.memoryBudget) -}}
{{- end -}}
{{- if and $v.memoryBudget (($v.resources | default dict).limits | default dict).memory -}}
  {{- $budget := include "culvert.bytes" $v.memoryBudget | float64 -}}
  {{- $limit := include "culvert.bytes" $v.resources.limits.memory | float64 -}}
  {{- if ge $budget $limit -}}
    {{- fail (printf "memoryBudget: %v must be less than resources.limits.memory, %v: the process itself needs some, too" $v.memoryBudget $v.resources.limits.memory) -}}
  {{- end -}}
{{- end -}}
{{- with $v.seccompProfile -}}
  {{- if and (eq .type "Localhost") (not .localhostProfile) -}}
    {{- fail "seccompProfile: type Localhost needs localhostProfile, a path below the kubelet's seccomp directory" -}}
  {{- end -}}
{{- end -}}
{{- range $name, $value := $v.env -}}
  {{- if or (kindIs "map" $value) (kindIs "slice" $value) -}}
    {{- fail (printf "env.%s: not a scalar" $name) -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* A quantity of memory in bytes. */}}
{{- define "culvert.bytes" -}}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[A-Za-z]*$" (toString .) -}}
{{- if not (hasKey $units $unit) -}}
  {{- fail (printf "%v: no quantity of memory, such as 128Mi" .) -}}
{{- end -}}
{{- mulf (trimSuffix $unit (toString .) | float64) (get $units $unit) -}}
{{- end -}}
