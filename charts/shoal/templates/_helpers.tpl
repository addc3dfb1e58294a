{{- define "shoal.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimSuffix "-" }}
{{- end }}

{{- define "shoal.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (include "shoal.name" .) .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "shoal.name" .) | trunc 40 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{/* Name of a cluster-wide object: releases of one name in two namespaces differ. */}}
{{- define "shoal.clusterName" -}}
{{- printf "%s:%s" .Release.Namespace (include "shoal.fullname" .) }}
{{- end }}

{{- define "shoal.labels" -}}
{{ include "shoal.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The router's selector is also how the operator finds routers. */}}
{{- define "shoal.selector" -}}
app.kubernetes.io/name: shoal
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{/* Takes a dict of `root` and `component`. */}}
{{- define "shoal.serviceAccount" -}}
{{- $account := (index .root.Values .component).serviceAccount -}}
{{- if $account.create -}}
{{- default (printf "%s-%s" (include "shoal.fullname" .root) .component) $account.name }}
{{- else -}}
{{- required (printf "%s.serviceAccount.name must name an account that exists, because %s.serviceAccount.create is false" .component .component) $account.name }}
{{- end -}}
{{- end }}

{{/* Takes a dict of `root` and `image`. */}}
{{- define "shoal.image" -}}
{{- $common := .root.Values.image -}}
{{- $name := .image.repository -}}
{{- with $common.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest }}
{{- else -}}
{{- printf "%s:%s" $name (coalesce .image.tag $common.tag .root.Chart.AppVersion) }}
{{- end -}}
{{- end }}

{{/* The parts of a pod's spec that operator and router share. Takes a dict of `root` and `component`. */}}
{{- define "shoal.pod" -}}
{{- $values := index .root.Values .component -}}
serviceAccountName: {{ include "shoal.serviceAccount" . }}
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
securityContext:
  {{- toYaml $values.podSecurityContext | nindent 2 }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  {{- if $values.topologySpreadConstraints }}
  {{- toYaml $values.topologySpreadConstraints | nindent 2 }}
  {{- else }}
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "shoal.selector" .root | nindent 8 }}
        app.kubernetes.io/component: {{ .component }}
    matchLabelKeys: [pod-template-hash]
  {{- end }}
{{- end }}

{{/* Labels and annotations of a pod. Takes a dict of `root`, `component` and `checksum`. */}}
{{- define "shoal.podMetadata" -}}
{{- $values := index .root.Values .component -}}
labels:
  {{- include "shoal.selector" .root | nindent 2 }}
  app.kubernetes.io/component: {{ .component }}
  {{- with .root.Values.commonLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with $values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $annotations := dict }}
{{- with .checksum }}{{ $annotations = dict "checksum/config" . }}{{ end }}
{{- with merge $annotations $values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* What the Role of a component allows. */}}
{{- define "shoal.operator.rules" -}}
- apiGroups: [serving.shoal.dev]
  resources: [inferenceservices]
  verbs: [get, list, watch]
- apiGroups: [serving.shoal.dev]
  resources: [inferenceservices/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [pods, services, configmaps]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [pods/log] # how far a download is
  verbs: [get]
{{- if .Values.featureGates.MultiNode }}
- apiGroups: [""]
  resources: [secrets] # the token of a group of pods
  verbs: [get, create]
{{- end }}
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [get, list, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, create, patch, delete]
- apiGroups: [monitoring.coreos.com]
  resources: [podmonitors]
  verbs: [get, list, create, patch, delete]
- apiGroups: [""]
  resources: [events]
  verbs: [get, create, patch]
{{- if .Values.externalMetrics.enabled }}
- apiGroups: [autoscaling]
  resources: [horizontalpodautoscalers]
  verbs: [get, list, create, patch, delete]
{{- end }}
{{- if .Values.keda.enabled }}
- apiGroups: [keda.sh]
  resources: [scaledobjects]
  verbs: [get, list, create, patch, delete]
{{- end }}
{{- if not .Values.namespaces }}
- apiGroups: [""]
  resources: [nodes] # whether one is lost
  verbs: [get, list, watch]
{{- end }}
{{- end }}

{{- define "shoal.metricsSecret" -}}
{{- default (printf "%s-operator-tls" (include "shoal.fullname" .)) .Values.externalMetrics.tls.secretName }}
{{- end }}

{{- define "shoal.router.rules" -}}
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch]
{{- end }}

{{/* Where the router answers, as clients within the cluster see it. */}}
{{- define "shoal.url" -}}
{{- $scheme := ternary "https" "http" .Values.router.tls.enabled -}}
{{- $usual := ternary 443 80 .Values.router.tls.enabled -}}
{{- $port := int .Values.router.service.port -}}
{{- $host := printf "%s-router.%s.svc" (include "shoal.fullname" .) .Release.Namespace -}}
{{- default (printf "%s://%s%s" $scheme $host (ternary "" (printf ":%d" $port) (eq $port $usual))) .Values.router.url }}
{{- end }}

{{- define "shoal.tlsSecret" -}}
{{- $tls := .Values.router.tls -}}
{{- if $tls.certManager.enabled -}}
{{- default (printf "%s-router-tls" (include "shoal.fullname" .)) $tls.secretName }}
{{- else -}}
{{- required "router.tls.secretName must name a Secret of type kubernetes.io/tls, or set router.tls.certManager.enabled=true" $tls.secretName }}
{{- end -}}
{{- end }}
