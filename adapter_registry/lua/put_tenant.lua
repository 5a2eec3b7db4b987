-- Keep a tenant's settings. KEYS: settings, audit. ARGV: settings as JSON, tenant, who, audit entries to keep.
if redis.call('GET', KEYS[1]) == ARGV[1] then return 1 end
redis.call('SET', KEYS[1], ARGV[1])
redis.call(
  'XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'by', ARGV[3], 'action', 'tenant.changed', 'subject', ARGV[2],
  'detail', ARGV[1]
)
return 1
