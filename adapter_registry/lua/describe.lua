-- Adapters as one moment saw them. KEYS: versions and aliases of each adapter, in pairs.
local answer = {}
for i = 1, #KEYS, 2 do
  answer[#answer + 1] = {redis.call('HGETALL', KEYS[i]), redis.call('HGETALL', KEYS[i + 1])}
end
return answer
