{{/* Labels of every object. Pods have none of them: a new version of the chart alone restarts no agent. */}}
{{- define "kiam-agent.labels" -}}
{{- $own := dict
    "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version)
    "app.kubernetes.io/instance" .Release.Name
    "app.kubernetes.io/managed-by" .Release.Service
    "app.kubernetes.io/name" (ternary (include "kiam-agent.uninstallName" .) .Values.name .Values.uninstall) -}}
{{ toYaml (merge $own .Values.labels) }}
{{- end }}

{{- define "kiam-agent.uninstallName" -}}
{{ trimSuffix "-agent" .Values.name }}-uninstall
{{- end }}

{{/* Labels and annotations of an object that has no others. */}}
{{- define "kiam-agent.metadata" -}}
labels:
  {{- include "kiam-agent.labels" . | nindent 2 }}
{{- with .Values.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "kiam-agent.image" -}}
{{ .Values.image.repository }}
{{- if .Values.image.digest }}@{{ .Values.image.digest }}
{{- else }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{- define "kiam-agent.serviceAccountName" -}}
{{ .Values.serviceAccount.name | default .Values.name }}
{{- end }}

{{/* Where pods may run, and who may pull their image: the same for the agent and its removal. */}}
{{- define "kiam-agent.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* A ClusterRole and its binding: a list of the context, the name, the rules and, if it is not the agent, the subject. */}}
{{- define "kiam-agent.clusterRole" -}}
{{- $context := index . 0 -}}
{{- $name := index . 1 -}}
{{- $agent := dict "kind" "ServiceAccount" "name" (include "kiam-agent.serviceAccountName" $context)
    "namespace" $context.Release.Namespace -}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ $name }}
  {{- include "kiam-agent.metadata" $context | nindent 2 }}
rules:
{{ index . 2 }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ $name }}
  {{- include "kiam-agent.metadata" $context | nindent 2 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ $name }}
subjects:
{{ list (gt (len .) 3 | ternary (last .) $agent) | toYaml }}
{{- end }}

{{/*
Objects of a file of policies, which is the one that kustomize deploys: a list of the context and the text, in which the
name, the namespace and what differs by value have been replaced.
*/}}
{{- define "kiam-agent.policies" -}}
{{- $context := index . 0 -}}
{{- range regexSplit "(?m)^---$" (index . 1) -1 }}
{{- $object := fromYaml . }}
{{- $_ := set $object "metadata" (merge $object.metadata (include "kiam-agent.metadata" $context | fromYaml)) }}
---
{{ toYaml $object }}
{{- end }}
{{- end }}
