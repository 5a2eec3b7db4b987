-- Keep an API key's record, or remove it (record ''). KEYS: API keys, their last uses, audit.
-- ARGV: key id, record, who, action, its label and role, audit entries to keep.
if ARGV[2] ~= '' then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
else
  redis.call('HDEL', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
end
redis.call(
  'XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], '*', 'by', ARGV[3], 'action', ARGV[4], 'subject', ARGV[1], 'detail', ARGV[5]
)
return 1
