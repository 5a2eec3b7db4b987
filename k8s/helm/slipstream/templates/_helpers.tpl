{{/* Every object's metadata: (dict "root" $ "name" "x"). */}}
{{- define "slipstream.metadata" -}}
name: {{ .name }}
namespace: {{ .root.Release.Namespace }}
labels:
  app.kubernetes.io/part-of: slipstream
{{- end }}

{{- define "slipstream.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "slipstream.raySelector" -}}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [ray-head, ray-worker]}
{{- end }}

{{/* What a container may: (dict) */}}
{{- define "slipstream.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Who a pod runs as: its user id. */}}
{{- define "slipstream.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "slipstream.environment" -}}
- {name: HOME, value: {{ .Values.settings.home }}}
- {name: HF_HOME, value: {{ .Values.settings.home }}/huggingface}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH, value: "deployments.proxy:middlewares"}
- {name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S, value: "120"}
- {name: RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S, value: "1"}
- name: SLIPSTREAM_REDIS_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.secretName }}, key: redis-url}}
- name: SLIPSTREAM_ADMIN_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.secretName }}, key: admin-key}}
- name: SLIPSTREAM_METRICS_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.secretName }}, key: metrics-key, optional: true}}
- name: AWS_ACCESS_KEY_ID
  valueFrom: {secretKeyRef: {name: {{ .Values.secretName }}, key: blob-access-key-id, optional: true}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom: {secretKeyRef: {name: {{ .Values.secretName }}, key: blob-secret-access-key, optional: true}}
- name: AWS_REGION
  valueFrom: {secretKeyRef: {name: {{ .Values.secretName }}, key: blob-region, optional: true}}
- name: AWS_ENDPOINT_URL
  valueFrom: {secretKeyRef: {name: {{ .Values.secretName }}, key: blob-endpoint, optional: true}}
{{- with .Values.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The Serve config that `slipstream config --rayservice` writes of the same settings. */}}
{{- define "slipstream.serveConfig" -}}
proxy_location: EveryNode
http_options:
  host: {{ .Values.settings.host }}
  port: {{ .Values.settings.port | default 8000 }}
logging_config:
  additional_log_standard_attrs:
  - name
  enable_access_log: false
  encoding: {{ .Values.settings.log_format | default "text" | upper }}
  log_level: {{ .Values.settings.log_level | default "INFO" }}
applications:
- name: slipstream
  route_prefix: /
  import_path: deployments.app:build
  args:
    {{- omit .Values.settings "host" "port" | toYaml | nindent 4 }}
{{- end }}

{{/* The folders a Ray container may write to; (dict "home" size "tmp" size "shm" size) */}}
{{- define "slipstream.volumes" -}}
- name: home
  emptyDir: {sizeLimit: {{ .home }}}
- name: tmp
  emptyDir: {sizeLimit: {{ .tmp }}}
- name: ray-logs
  emptyDir: {sizeLimit: 10Gi}
- name: shared-mem
  emptyDir: {medium: Memory, sizeLimit: {{ .shm }}}
{{- end }}

{{- define "slipstream.volumeMounts" -}}
- {name: home, mountPath: {{ .Values.settings.home }}}
- {name: tmp, mountPath: /tmp}
- {name: ray-logs, mountPath: /tmp/ray}
- {name: shared-mem, mountPath: /dev/shm}
{{- end }}
