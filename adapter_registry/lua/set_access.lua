-- Say who else may call an adapter. KEYS: versions, access, audit.
-- ARGV: access as JSON, who, the adapter's name, audit entries to keep. Answers 1, or 0 when there is none.
if redis.call('EXISTS', KEYS[1]) == 0 then return 0 end
if redis.call('GET', KEYS[2]) == ARGV[1] then return 1 end
redis.call('SET', KEYS[2], ARGV[1])
redis.call(
  'XADD', KEYS[3], 'MAXLEN', '~', ARGV[4], '*', 'by', ARGV[2], 'action', 'access.changed', 'subject', ARGV[3],
  'detail', string.sub(ARGV[1], 1, 500)
)
return 1
