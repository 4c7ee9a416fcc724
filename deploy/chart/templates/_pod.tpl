{{/* Requests and limits, without what was set to null. */}}
{{- define "culvert.resources" -}}
{{- $kept := dict -}}
{{- range $kind, $quantities := .Values.resources | default dict -}}
  {{- range $name, $quantity := $quantities | default dict -}}
    {{- if not (kindIs "invalid" $quantity) -}}
      {{- $_ := set $kept $kind (set (get $kept $kind | default dict) $name (include "culvert.text" $quantity)) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- with $kept -}}
{{ toYaml . }}
{{- end -}}
{{- end -}}

{{- define "culvert.volumes" -}}
{{- $v := .Values -}}
- name: istio-token
  projected:
    sources:
    - serviceAccountToken:
        path: istio-token
        expirationSeconds: 43200
        audience: istio-ca
    {{- if and $v.openbao.enabled (eq $v.openbao.jwtSource "file") }}
    - serviceAccountToken:
        path: openbao-token
        expirationSeconds: 3600
        audience: {{ $v.openbao.auth.audience }}
    {{- end }}
- name: istiod-ca-cert
  {{- if eq (toString (get $v.env "ENABLE_CLUSTER_TRUST_BUNDLE_API")) "true" }}
  projected:
    sources:
    - clusterTrustBundle:
        name: istio.io:istiod-ca:root-cert
        path: root-cert.pem
  {{- else }}
  configMap:
    name: {{ $v.trustBundleName }}
  {{- end }}
- name: cni-ztunnel-sock-dir
  hostPath:
    path: /var/run/ztunnel
    type: DirectoryOrCreate
- name: tmp
  emptyDir: {}
{{- if $v.peerCaCrl.enabled }}
- name: istio-ca-crl
  configMap:
    name: istio-ca-crl
    optional: true
{{- end }}
{{- if eq $v.state.type "hostPath" }}
- name: state
  hostPath:
    path: {{ $v.state.hostPath }}
    type: DirectoryOrCreate
{{- else if eq $v.state.type "emptyDir" }}
- name: state
  emptyDir:
    sizeLimit: {{ $v.state.sizeLimit }}
{{- end }}
{{- if $v.state.keys }}
- name: keys
  {{- if eq $v.state.type "hostPath" }}
  hostPath:
    path: {{ $v.state.keysHostPath }}
    type: DirectoryOrCreate
  {{- else }}
  emptyDir:
    medium: Memory
    sizeLimit: 16Mi
  {{- end }}
{{- end }}
{{- if $v.openbao.enabled }}
{{- with $v.openbao.caConfigMap }}
- name: openbao-ca
  configMap:
    name: {{ . }}
    items:
    - {key: {{ $v.openbao.caKey }}, path: ca.crt}
{{- end }}
{{- with $v.openbao.caSecret }}
- name: openbao-ca
  secret:
    secretName: {{ . }}
    items:
    - {key: {{ $v.openbao.caKey }}, path: ca.crt}
{{- end }}
{{- end }}
{{- with $v.volumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}
