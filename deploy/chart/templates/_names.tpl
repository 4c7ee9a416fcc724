{{- define "culvert.name" -}}
{{ .Values.resourceName | default "ztunnel" }}
{{- end -}}

{{- define "culvert.image" -}}
{{- $v := .Values -}}
{{- if contains "/" $v.image -}}
{{ $v.image }}
{{- else -}}
{{ $v.hub }}/{{ $v.image }}:{{ $v.tag | default .Chart.AppVersion }}{{ with $v.variant }}-{{ . }}{{ end }}
{{- end -}}
{{- end -}}

{{/* Whether resources of a scope, `cluster` or `namespace`, are wanted: (list CONTEXT SCOPE). */}}
{{- define "culvert.wants" -}}
{{- if has (index . 0).Values.resourceScope (list "all" (index . 1)) -}}true{{- end -}}
{{- end -}}

{{- define "culvert.labels" -}}
app.kubernetes.io/name: ztunnel
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/version: {{ .Values.tag | default .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: istio
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end -}}

{{/* Labels and annotations that every object has, below `metadata`. */}}
{{- define "culvert.metadata" -}}
labels:
  {{- include "culvert.labels" . | nindent 2 }}
  {{- with .Values.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := merge (dict) .Values.annotations }}
{{- with .Values.revision }}
{{- $_ := set $annotations "istio.io/rev" . }}
{{- end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
